"""Answers of a teacher as training data: asked for, judged, and kept so that nothing is paid for twice."""
