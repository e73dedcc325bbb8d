"""Files written completely or not at all, and large tensors read and written at the speed of the disk."""
