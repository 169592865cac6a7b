"""Text, data sets and chats -> calibration windows and training rows of tokens."""
