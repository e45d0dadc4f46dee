from looped_fast.env_report import report


def test_the_report_has_what_a_bug_report_needs():
    text = report()
    for expected in ("looped_fast 0.", "bf16 on c", "backend: ", "PyTorch version", "CPU"):
        assert expected in text
