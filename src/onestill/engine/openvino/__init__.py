"""The runtime of the base install: OpenVINO on the CPU, without torch."""
