"""
Serve a language model over HTTP, by the server of Transformers, whose requests are those of OpenAI's API.

    python -m scripts.serve runs/stdlib-code/final
    python -m scripts.serve someone/stdlib-code --port 9000 --default-seed 0
    transformers chat runs/stdlib-code/final http://localhost:8000/v1    # in another terminal

CHECKPOINT is the final/ of a run, or the name of a model on the Hub. All further options are those of `transformers
serve` (`transformers serve --help`); `pip install -e '.[serve]'` installs what it needs. `/v1/completions` continues a
prompt, `/v1/chat/completions` needs a chat template (`tokenizer.chat_template` in a recipe).

`transformers serve` itself finds a model's class by its name in Transformers, where models from outside are not, with
remote code or without; this command puts the class there.
"""

import argparse
import sys

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cli.serving import model_manager
from transformers.utils.import_utils import is_serve_available

import modeling_rtransformer  # noqa: F401 - registers the model types
import scripts.baselines  # noqa: F401 - and those of the baselines


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The checkpoint, and the options of `transformers serve`."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="the folder of a saved language model, or its name on the Hub")
    return parser.parse_known_args(arguments)


def make_known(checkpoint: str) -> None:
    """
    Put the class of a checkpoint's language model where the server looks for it.

    Raises:
        ValueError: the checkpoint is no language model, or another kind of model that was saved under its name.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    saved_as = (config.architectures or ["nothing"])[0]
    if model_class is None or model_class.__name__ != saved_as:
        raise ValueError(
            f"{checkpoint} must be a causal language model to be served, got `architectures` {config.architectures} "
            f"of `model_type` {config.model_type!r}"
        )
    setattr(model_manager.transformers, model_class.__name__, model_class)


def main(arguments: list[str] | None = None) -> None:
    options, further = parse_arguments(arguments)
    if not is_serve_available():
        sys.exit("error: the server needs fastapi, uvicorn and openai: pip install -e '.[serve]'")
    try:
        make_known(options.checkpoint)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    from transformers.cli.transformers import app  # needs the libraries above

    app(["serve", options.checkpoint, *further])


if __name__ == "__main__":
    main()
