"""Images: found, decoded, resized and normalised; and boxes drawn on them."""
