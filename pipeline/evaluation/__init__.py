"""How far a student is from its teacher on text that neither the cache nor the student was made from."""
