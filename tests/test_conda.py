"""The conda recipe says what pyproject.toml says."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import selfkd
import yaml
from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPE = ROOT / "conda" / "recipe.yaml"
VARIANTS = {"None": "cpu_", "12.9": "cuda129_"}  # of CUDA's compiler, and how the build is called


@pytest.fixture(scope="module")
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_it_is_the_same_package(project: Any) -> None:
    recipe, named = yaml.safe_load(RECIPE.read_text()), project["project"]
    assert recipe["context"] == recipe["context"] | {
        "name": named["name"],
        "version": selfkd.__version__,
    }
    assert recipe["about"]["summary"] == named["description"]
    assert recipe["about"]["license"] == named["license"]
    assert [recipe["about"]["license_file"]] == named["license-files"]
    scripts = [f"{name} = {function}" for name, function in named["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == scripts


def test_it_needs_the_same(project: Any) -> None:
    needs, named = yaml.safe_load(RECIPE.read_text())["requirements"], project["project"]
    python = f"python {named['requires-python']}"
    assert "dependencies" not in named
    assert needs["run"] == [python]
    assert [x.replace("pytorch ", "torch") for x in needs["run_constraints"]] == named[
        "optional-dependencies"
    ]["torch"]
    backend = [x.replace(">=", " >=") for x in project["build-system"]["requires"]]
    host = [x for x in needs["host"] if isinstance(x, str)]
    assert set(host) == {python, "pip", *backend}
    assert f"cmake {project['tool']['scikit-build']['cmake']['version']}" in needs["build"]


def test_it_renders() -> None:
    """By rattler-build's parser, which refuses a field that it does not know."""
    rattler_build = pytest.importorskip("rattler_build", reason="pip install py-rattler-build")
    variants = rattler_build.VariantConfig.from_file(RECIPE.with_name("variants.yaml"))
    platform = rattler_build.PlatformConfig(target_platform="linux-64")
    found = rattler_build.Stage0Recipe.from_file(RECIPE).render(
        variants, rattler_build.RenderConfig(platform=platform)
    )
    builds = {x.variant["cuda_compiler_version"]: x.recipe.to_dict() for x in found}
    assert set(builds) == set(VARIANTS)
    for version, build in builds.items():
        assert build["build"]["string"].startswith(VARIANTS[version])
        compilers = [x for x in build["requirements"]["build"] if x.startswith("cuda")]
        assert bool(compilers) == (version != "None")
