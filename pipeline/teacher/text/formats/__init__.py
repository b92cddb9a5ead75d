"""What a row of data holds: text, a conversation, token ids, and a prompt that only the teacher reads."""
