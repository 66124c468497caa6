"""The losses under the names, arguments and shapes of common training toolkits.

A module for each toolkit: :mod:`.torchdistill`, :mod:`.mdistiller`, :mod:`.mmrazor`, :mod:`.transformers`.
Each imports without its toolkit. ``docs/integrations.md`` shows what changes in a training script.
"""
