"""What of the data can be trained on: rules, look-alikes, lengths, images, overlap with what is evaluated."""
