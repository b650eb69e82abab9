"""Recipes by name: what a user gives stands, and the recipe sets the rest."""

import json
from dataclasses import replace

import pytest

from rapidindex.caching.build import build
from rapidindex.config import RECIPES, BuildRequest, GradientConfig, ModelConfig, SketchConfig
from rapidindex.errors import UsageError
from rapidindex.query.index import Index
from rapidindex.recipe import Recipe
from tests.cli.conftest import rapidindex
from tests.oracles import all_rows, request


def asked(recipe, **given):
    return BuildRequest("data", "index", ModelConfig("model", "adapter"), recipe=recipe, **given)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_what_is_not_given(recipe):
    got = asked(recipe)
    values = {**vars(got.gradient), **vars(got.sketch)}
    assert RECIPES[recipe].items() <= values.items()


def test_a_value_that_is_given_stands_even_where_it_is_the_default_of_another_recipe():
    got = asked("rapidin", gradient=GradientConfig(normalize="unit", seed=3), sketch=SketchConfig(K=1024))
    assert (got.gradient.normalize, got.gradient.second_moment, got.gradient.seed) == ("unit", "none", 3)
    assert got.sketch.K == 1024


@pytest.mark.parametrize(
    ("model", "projection", "moment"),
    [
        (ModelConfig("model", "adapter"), None, "kronecker"),
        (ModelConfig("model", "adapter"), "two-sided", "kfac"),
        (ModelConfig("model"), None, "estimate"),
        ("model", "two-sided", "kfac"),
    ],
)
def test_the_default_correction_is_the_strongest_that_the_model_and_the_projection_allow(model, projection, moment):
    got = BuildRequest("data", "index", model, sketch=SketchConfig(projection=projection))
    assert got.gradient.second_moment == moment
    typed = GradientConfig(second_moment="kronecker")
    assert replace(got, gradient=typed).gradient.second_moment == "kronecker"


def test_an_unknown_recipe_is_refused_with_the_names_there_are():
    with pytest.raises(UsageError, match="--recipe 'influence' is unknown") as refused:
        asked("influence")
    assert all(name in refused.value.hint for name in RECIPES)


def test_a_recipe_and_its_values_typed_out_build_the_same_rows(data, tmp_path, llama_folders):
    build(request(data, tmp_path / "named", llama_folders, recipe="rapidin"))
    build(request(data, tmp_path / "typed", llama_folders, gradient=GradientConfig("layer", "none")))
    named, typed = all_rows(tmp_path / "named"), all_rows(tmp_path / "typed")
    assert named.keys() == typed.keys() and all((named[id] == typed[id]).all() for id in named)


def test_info_names_the_recipe_or_says_custom(data, tmp_path, llama_folders):
    base, adapter = map(str, llama_folders)
    build(BuildRequest(str(data), str(tmp_path / "named"), ModelConfig(base, adapter), recipe="tracin", limit=2))
    build(request(data, tmp_path / "custom", llama_folders, recipe="tracin", limit=2))  # of another K
    assert Index.open(tmp_path / "named").info()["recipe"] == "tracin"
    assert Index.open(tmp_path / "custom").info()["recipe"] == "custom"
    build(BuildRequest(str(data), str(tmp_path / "whole"), ModelConfig(base), limit=2))
    assert Index.open(tmp_path / "whole").info()["recipe"] == "default"


def test_the_command_line_takes_a_recipe_and_single_flags_over_it(data, tmp_path, llama_folders):
    base, adapter = llama_folders
    model = ["-m", base, "-a", adapter, "-o", tmp_path / "index", "--limit", 2]
    done = rapidindex("build", data, *model, "--recipe", "rapidin", "-K", 256, "--quiet")
    assert done.returncode == 0, done.stderr
    shown = rapidindex("info", tmp_path / "index")
    assert "custom: second moment none, normalize layer" in shown.stdout
    config = json.loads(rapidindex("info", tmp_path / "index", "--json").stdout)["config"]
    assert Recipe.from_manifest(config).sketch.K == 256
