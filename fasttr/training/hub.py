"""Uploads to the Hugging Face hub, as transformers' `push_to_hub` and `hub_strategy` mean them."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from fasttr.checkpoint.state import STATE_DIR
from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.errors import FasttrError, one_line
from fasttr.training.callbacks import Callback
from fasttr.training.run import Run

# What of an output folder is no part of a model's repository.
NOT_UPLOADED = ["checkpoint-*", "superseded-*", ".*", "**/.*"]
NEWEST = "last-checkpoint"  # what resuming from the hub looks for


class _Upload(NamedTuple):
    """An upload under way, and the folder that it reads."""

    future: Future[Any]
    copy: Path

    def finish(self) -> None:
        """Wait for it, say its failure, and clear what it read."""
        error = self.future.exception()
        if error is not None:
            say(f"WARNING: push_to_hub: an upload failed ({one_line(error)})")
        shutil.rmtree(self.copy, ignore_errors=True)


class PushToHub(Callback):
    """Uploads checkpoints as they are saved and the final model at the end.

    The repository is made when this is built, so that a wrong token or name stops a run before it
    reads anything. An upload goes on beside training; one that fails is said, and only the last
    one's failure is an error, once the model is saved.
    """

    def __init__(self, config: TrainConfig):
        from huggingface_hub import HfApi

        self._config = config
        self._api = HfApi(token=config.hub_token)
        self._under_way: list[_Upload] = []
        for left in config.output_folder.glob(".checkpoint-*.push"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        name = config.hub_model_id or config.output_folder.resolve().name
        try:
            made = self._api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
            self._repository = made.repo_id
            if config.hub_revision is not None:
                self._api.create_branch(self._repository, branch=config.hub_revision, exist_ok=True)
        except Exception as error:  # the hub, the network and its client raise their own kinds
            raise FasttrError(
                f"push_to_hub: cannot make or open the repository {name!r} ({one_line(error)}): "
                "check hub_model_id and the access token (hf auth login), or leave push_to_hub out"
            ) from error

    def on_save(self, run: Run, folder: Path) -> None:
        strategy = self._config.hub_strategy
        if strategy == "end" or not self._may_begin():
            return
        message = f"Training in progress, step {run.step}"
        self._begin(folder, message, without_state=True)
        if strategy == "checkpoint":
            self._begin(folder, f"{message}, checkpoint", path_in_repo=NEWEST)
        elif strategy == "all_checkpoints":
            self._begin(folder, f"{message}, checkpoint", path_in_repo=folder.name)

    def on_train_end(self, run: Run) -> None:
        for upload in self._under_way:
            upload.finish()
        self._under_way = []
        try:
            self._upload(
                run.output_dir, "End of training", ignore_patterns=[*NOT_UPLOADED, "*.partial*"]
            )
        except Exception as error:
            raise FasttrError(
                f"push_to_hub: the final model could not be uploaded ({one_line(error)}); it is in "
                f"{run.output_dir}"
            ) from error
        say(f"uploaded the model to {self._repository}")

    def _may_begin(self) -> bool:
        """Whether no upload is under way, or another one is wanted beside it."""
        done = [upload for upload in self._under_way if upload.future.done()]
        for upload in done:
            upload.finish()
        self._under_way = [upload for upload in self._under_way if upload not in done]
        return not self._under_way or self._config.hub_always_push

    def _begin(
        self,
        folder: Path,
        message: str,
        path_in_repo: str | None = None,
        without_state: bool = False,
    ) -> None:
        # Links to the files: the checkpoint itself may be rotated away before they are read.
        copy = folder.parent / f".{folder.name}.{len(self._under_way)}.push"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, copy_function=os.link)
        future = self._upload(
            copy,
            message,
            path_in_repo=path_in_repo,
            ignore_patterns=[f"{STATE_DIR}/*"] if without_state else None,
            run_as_future=True,
        )
        self._under_way.append(_Upload(future, copy))

    def _upload(self, folder: Path, message: str, **options: Any) -> Any:
        return self._api.upload_folder(
            repo_id=self._repository,
            folder_path=str(folder),
            commit_message=message,
            revision=self._config.hub_revision,
            **options,
        )


def hub_callbacks(config: TrainConfig) -> list[Callback]:
    """The upload of a run that asks for one."""
    return [PushToHub(config)] if config.push_to_hub else []
