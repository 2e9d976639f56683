"""`fastdistill push`: uploads a finished run's data set to the Hugging Face Hub, after looking that it is whole."""

from pathlib import Path

from fastdistill.control.folder import RunFolder, read_json
from fastdistill.core.errors import ConfigError, EnvironmentFault, InputError
from fastdistill.core.files import sha256_file


def push_run(run: str, repo: str, *, private: bool, exported: Path | None, output_dir: Path | None) -> str:
    """Uploads `dist/` in one commit, or the folder that `fastdistill export` wrote; the address of the commit.

    The token is that of the Hub's own client: HF_TOKEN, or what `hf auth login` has kept. HF_ENDPOINT is another Hub.

    Raises:
        InputError: there is no such run, it did not come to its end, or a file is not the one that was written.
        ConfigError: huggingface_hub is missing, or the Hub refuses the token or the name.
        EnvironmentFault: the Hub can't be reached, or is out of order.
    """
    folder = RunFolder.find(output_dir, run)
    status = read_json(folder.manifest)["status"]
    if status not in ("complete", "below_floor"):
        raise InputError(f"{folder.run_id}: {status}; only a finished run is pushed: run it to its end first")
    dataset = exported or folder.dist
    check_whole(dataset)
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.errors import HTTPError as NotReached  # type: ignore[attr-defined]  # its HTTP client's
    except ImportError as error:
        raise ConfigError("push needs huggingface_hub; run `pip install 'fastdistill[hub]'`") from error
    hub = HfApi(library_name="fastdistill")
    try:
        hub.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo, repo_type="dataset", folder_path=dataset, commit_message=f"FastDistill run {folder.run_id}"
        )
    except HFValidationError as error:
        raise ConfigError(f"--repo: {error}") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        words = f"{constants.ENDPOINT}: {code}: {error.server_message or error}"
        if code in (401, 403):
            raise ConfigError(f"{words}; set HF_TOKEN to a token that may write to {repo}") from error
        raise EnvironmentFault(f"{words}; the data set is untouched: try again later") from error
    except (NotReached, OSError) as error:
        raise EnvironmentFault(f"{constants.ENDPOINT}: {error}; is it reachable from here?") from error
    return str(commit.commit_url)


def check_whole(dataset: Path) -> None:
    """Raises InputError unless every file of a data set is there and is the one of its `checksums.txt`."""
    listed = dataset / "checksums.txt"
    if not listed.is_file():
        raise InputError(f"{listed}: not there; push what `fastdistill pipeline run` or `export` has written")
    for line in listed.read_text(encoding="utf-8").splitlines():
        checksum, _, name = line.partition("  ")
        path = dataset / name
        if not path.is_file() or sha256_file(path) != checksum:
            raise InputError(f"{path}: not the file that was written; `fastdistill export` writes the data set again")
