import pytest

pytest.register_assert_rewrite("tests.helpers", "tests.started", "tests.tiny_parts")
