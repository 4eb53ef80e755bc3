"""`konly inspect`: what a GGUF file holds. The figures come from engine/describe.py."""

from __future__ import annotations

import json
from typing import Any

import click

from ..console import print_tables, printable, size
from .options import chosen_model, json_option, model_options


@click.command(short_help="Tell what a GGUF file holds, and what context fits.")
@model_options
@json_option
def inspect(as_json: bool, **options: Any) -> None:
    """Tell what a GGUF file holds, what its K-cache costs, and what context fits this machine's memory."""
    from ..describe import describe
    from ..engine import default_model

    told = describe(chosen_model(options) or default_model())
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        print_tables(_description(told), _types_table(told), _cache_table(told))
        for problem in told["problems"]:
            click.echo(printable(f"cannot run: {problem}"))


def _description(told: dict[str, Any]) -> dict[str, str]:
    rows = {
        "file": f"{told['path']}, {size(told['nbytes'])}",
        "name": told["name"] or "-",
        "architecture": told["arch"] or "-",
        "parameters": f"{told['n_params']:,}",
    }
    if "hparams" not in told:
        return rows
    h = told["hparams"]
    rows["parameters"] += f", {told['n_params_active']:,} active per token"
    rows["form"] = f"{told['form']}: {told['form_note']}"
    rows["layers"] = f"{h['n_layer']}, {h['n_layer_dense_lead']} of them dense"
    if h["n_layer_nextn"]:
        rows["layers"] += f"; {h['n_layer_nextn']} MTP blocks are skipped ({size(told['mtp_nbytes'])})"
    rows["embedding"] = f"{h['n_embd']}, vocabulary {h['n_vocab']:,}"
    rows["attention"] = (
        f"{h['n_head']} heads, nope {h['n_embd_head_nope']} + rope {h['n_rot']}, v {h['n_embd_head_v']}, "
        f"kv_lora_rank {h['kv_lora_rank']}, q_lora_rank {h['q_lora_rank'] or '-'}"
    )
    if h["n_expert"]:
        rows["experts"] = (
            f"{h['n_expert_used']} of {h['n_expert']}, {h['n_expert_shared']} shared, width {h['n_ff_exp']}, "
            f"{h['expert_gating']} routing"
        )
    scaling = "" if h["rope_scaling"] == "none" else f", {h['rope_scaling']} ×{h['rope_factor']:g}"
    rows["trained context"] = f"{h['n_ctx_train']:,} tokens (rope base {h['rope_freq_base']:g}{scaling})"
    rows["K-cache row"] = f"{h['kv_lora_rank']} latent + {h['n_rot']} rope, in each layer; no V"
    return rows


def _types_table(told: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("tensor type", "tensors", "size", "")]
    for name, entry in told["tensor_types"].items():
        rows.append((name, f"{entry['count']:,}", size(entry["nbytes"]), "" if entry["runs"] else "no kernel"))
    return rows


def _cache_table(told: dict[str, Any]) -> list[tuple[str, ...]]:
    if "k_cache" not in told:
        return []
    available = told["memory_available"]
    fits = f"n_ctx that fits {size(available)} available" if available is not None else "n_ctx that fits"
    rows: list[tuple[str, ...]] = [("type_k", "bytes per token", f"at {told['hparams']['n_ctx_train']:,} tokens", fits)]
    for type_k, entry in told["k_cache"].items():
        n_ctx = entry["n_ctx_fits"]
        shown = "unknown" if n_ctx is None else f"{n_ctx:,}"
        if n_ctx == told["hparams"]["n_ctx_train"]:
            shown += " (as trained)"
        rows.append((type_k, f"{entry['bytes_per_token']:,}", size(entry["n_ctx_train_nbytes"]), shown))
    return rows
