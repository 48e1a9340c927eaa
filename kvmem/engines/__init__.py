"""Engines that kvmem serves; each is imported only inside its own room."""
