"""The losses under the names, arguments and shapes of common training toolkits.

A module for each toolkit: :mod:`.torchdistill`, :mod:`.mdistiller`, :mod:`.mmrazor`, :mod:`.timm`,
:mod:`.self_kd_lib`, :mod:`.transformers`, :mod:`.trl`. Each imports without its toolkit. What gets a
gradient from the toolkit's own class gets one here. ``docs/integrations.md`` shows what changes in a training
script.
"""
