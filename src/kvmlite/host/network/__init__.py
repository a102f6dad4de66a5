"""The host's side of guest networks: links a guest's frames travel over, what they may reach, and how all of it goes away again."""
