"""What holds for every test."""

from hypothesis import HealthCheck, settings

# A busy machine is slow, not wrong; tests of speed measure their own processor time.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
# A change is not refused for what chance found: every run tries the same examples.
settings.register_profile("llmsize", patient, derandomize=True)
# That is looked for with `pytest --hypothesis-profile=search`, which overrides what is loaded here.
settings.register_profile("search", patient, max_examples=20 * patient.max_examples)
settings.load_profile("llmsize")
