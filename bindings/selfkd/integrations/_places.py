"""Where torchdistill keeps what it saw of modules: dictionaries by module path and by "input" or "output"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import arguments
from ._shared import Names

IO = Mapping[str, Mapping[str, Any]]


class Place(NamedTuple):
    """Where torchdistill keeps what it saw of a module of the student or the teacher."""

    side: str
    path: str
    io: str

    @property
    def name(self) -> str:
        return f'{self.side}_io_dict["{self.path}"]["{self.io}"]'

    def of(self, io_dict: IO) -> Any:
        return io_dict[self.path][self.io]

    def found(self, op: str, io_dict: Any) -> Any:
        """What was seen, or the sentence that says why nothing was."""
        side, path, io = self
        if not isinstance(io_dict, Mapping):
            found = arguments.described(io_dict)
            raise TypeError(f"{op}: {side}_io_dict is {found}, expected a dict of modules")
        of_module = io_dict.get(path)
        if not isinstance(of_module, Mapping) or io not in of_module:
            seen = ", ".join(f'"{module}"' for module in io_dict) or "none"
            raise ValueError(
                f'{op}: {side}_io_dict has no {io} of module "{path}", expected one of what was seen'
                f" ({seen}); the {side}'s forward_hook in the configuration says of which modules"
            )
        return of_module[io]


def found(
    op: str, places: tuple[Place, Place], student_io_dict: Any, teacher_io_dict: Any
) -> tuple[Any, Any, Names]:
    """What was seen of student and teacher, and the names of both for sentences."""
    student, teacher = places
    seen = student.found(op, student_io_dict), teacher.found(op, teacher_io_dict)
    return *seen, (student.name, teacher.name)


def places(
    student_path: str, student_io: str, teacher_path: str, teacher_io: str
) -> tuple[Place, Place]:
    """The places of student and teacher."""
    return Place("student", student_path, student_io), Place("teacher", teacher_path, teacher_io)
