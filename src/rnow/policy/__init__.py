"""The student as something that learns: a LoRA adapter on a frozen base."""
