"""Images as references: where their files are, pages of files, numbers in texts. None is decoded."""
