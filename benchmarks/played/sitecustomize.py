"""Plays the PCI bus of a TPU VM. Python imports this file at its start if its folder is on
PYTHONPATH; JAX counts the TPU chips of a machine below /sys/bus/pci/devices, and finds those of the
folder $PLAYED_PCI instead."""

import glob
import os

_real = glob.glob


def _played(pattern, **options):
    bus = "/sys/bus/pci/devices"
    if str(pattern).startswith(bus) and "PLAYED_PCI" in os.environ:
        pattern = os.environ["PLAYED_PCI"] + str(pattern)[len(bus) :]
    return _real(pattern, **options)


glob.glob = _played
