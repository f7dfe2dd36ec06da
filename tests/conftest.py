"""What holds for every test."""

from hypothesis import settings

# A busy machine is slow, not wrong; tests of speed measure their own processor time.
settings.register_profile("llmsize", deadline=None)
settings.load_profile("llmsize")
