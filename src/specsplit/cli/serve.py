"""specsplit serve"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from specsplit.cli.flags import add_setting_flags, load_settings
from specsplit.cli.worker_flags import workers_for
from specsplit.errors import UserError
from specsplit.settings.run import OrchestratorConfig
from specsplit.settings.serve import ServeSettings

log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    text = "start a {} worker on this model folder, instead of using a running one"
    parser.add_argument("--target-model", type=Path, metavar="FOLDER", help=text.format("target"))
    parser.add_argument("--draft-model", type=Path, metavar="FOLDER", help=text.format("draft"))
    # A request says how long its text may be, and where it ends.
    length = ("max_output_tokens", "max_rounds", "stop", "stop_token_ids", "ignore_eos")
    without = (*length, "seed", "use_chat_template")
    add_setting_flags(parser, ServeSettings, OrchestratorConfig, without=without)


def run(args: argparse.Namespace) -> None:
    from specsplit.api.pair import over_grpc
    from specsplit.models.sources import tokenizer_folder
    from specsplit.models.tokenizer import TextCodec

    settings, config = load_settings(ServeSettings, args), load_settings(OrchestratorConfig, args)
    try:
        from specsplit.serve.app import application
        from specsplit.serve.listening import listen, read_keys
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}, which is not installed: pip install 'specsplit[serve]'") from None
    keys = read_keys(settings, insecure=config.insecure)
    models = {role: path for role in ("target", "draft") if (path := getattr(args, f"{role}_model")) is not None}
    if "draft" in models and "target" not in models:
        raise UserError("--draft-model: give --target-model as well; both workers are started, or neither")
    if models and "draft" not in models:
        config = config.model_copy(update={"gamma": 0})
    with workers_for(models, config, max_sessions=settings.max_running, again=True) as config:
        folder = config.tokenizer or models.get("target")
        codec = None if folder is None else TextCodec.load(tokenizer_folder(folder))
        drafts = config.gamma != 0
        with over_grpc(config, codec, has_draft=drafts, at_once=settings.max_running) as pair:
            if pair.codec is None:
                raise UserError("the target worker gives no tokenizer: name a folder that has it, --tokenizer FOLDER")
            target = pair.target
            assert target is not None
            app = application(
                pair,
                settings,
                model=settings.served_model_name or target.model,
                max_context=min(config.max_context or target.max_context, target.max_context),
                gamma=config.gamma,
                keys=keys,
            )
            listen(app, settings)
