"""Torch modules -> the forms that ship: diffusers' folders, OpenVINO's graphs, int8. Needs `[torch]`."""
