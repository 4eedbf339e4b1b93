"""The student: learner, sampler and spare vocabulary rows."""
