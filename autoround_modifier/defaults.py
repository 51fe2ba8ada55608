"""What commands take where nothing else is said."""

__all__ = [
    "EVALUATION_LENGTH",
    "EVALUATION_SAMPLES",
    "GENERATED_SEQ_LENGTH",
    "MAX_NEW_TOKENS",
    "MAX_SEQ_LENGTH",
    "NUM_CALIBRATION_SAMPLES",
    "RECIPE",
    "calibration_length",
]

# Of the shipped ones
RECIPE = "w4a16_autoround"
# Where no modifier says how many it takes
NUM_CALIBRATION_SAMPLES = 128
# Tokens in each calibration sample of a dataset, and in each that the model writes itself
MAX_SEQ_LENGTH = 2048
GENERATED_SEQ_LENGTH = 512
# Samples of the text of an evaluation, tokens in each, and tokens in each generation
EVALUATION_SAMPLES = 32
EVALUATION_LENGTH = 512
MAX_NEW_TOKENS = 64


def calibration_length(has_dataset: bool) -> int:
    """
    :param has_dataset: whether calibration data is given; the model writes its own otherwise
    :return: tokens in each calibration sample
    """
    return MAX_SEQ_LENGTH if has_dataset else GENERATED_SEQ_LENGTH
