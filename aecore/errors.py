"""The exceptions that aecore raises; each knows the exit status of a command that it ends."""


class AecoreError(Exception):
    """Base of aecore's exceptions. Its message is one line that says what is wrong and what to do.

    Not a `ValueError`: the command-line parser would catch that and print it as its own.
    """

    exit_status = 2

    def __init__(self, message: str):
        # Messages of other libraries, quoted in ours, may have several lines.
        super().__init__(" ".join(message.split()))


class ConfigError(AecoreError):
    """A setting, or a combination of settings, that can't work."""


class DataError(AecoreError):
    """A data source that is unknown, missing or empty."""


class ImageError(AecoreError):
    """A picture, or an array of pixels, that can't be read or that the model doesn't take."""


class CheckpointError(AecoreError):
    """A run directory with no usable checkpoint, or one that belongs to a different experiment."""


class SavingError(AecoreError):
    """A checkpoint can't be written, for example as the disk is full. Earlier ones are kept."""

    exit_status = 1


class ProcessError(AecoreError):
    """Another process of the same training didn't come, failed, or is gone."""

    exit_status = 1


class NonFiniteLossError(AecoreError):
    """The loss became NaN or infinite. The last good checkpoint is kept."""

    exit_status = 1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped the work. What was done is saved; the same command resumes it.

    Training saves a checkpoint first.
    """
