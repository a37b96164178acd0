"""Families that the general mechanism in `patch` cannot serve, one small file each."""
