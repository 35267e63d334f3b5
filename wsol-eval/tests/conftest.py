import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # test_protocol uses the subprocess runner of test_train
