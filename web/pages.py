"""Pages: what stands on each of the audit pages.

Belongs here: for each address, what is asked of rsft_pipeline/audit and handed to which template. Not: how it is
asked (browse.py and its neighbours), what it looks like (templates/), nor who may see it (app.py).
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from resources import pages as to
from rsft_pipeline.audit import browse
from rsft_pipeline.audit.ids import AuditError
from web import drawing
from web.show import render

router = APIRouter(default_response_class=HTMLResponse)
After = Annotated[str | None, Query()]


def around(request: Request) -> dict[str, Any]:
    """What every page shows around its contents."""
    state = request.app.state
    return {"home": str(state.home.path), "token": state.token, "asked_for": request.query_params.get("q", "")}


def _page(request: Request, template: str, **values: Any) -> str:
    return render(template, **around(request), **values)


def _following(request: Request, page: browse.Page) -> str | None:
    """The address of the next page of a list."""
    if page.following is None:
        return None
    return "?" + str(request.url.include_query_params(after=page.following).query)


def _first(request: Request) -> str:
    """The address of the first page of a list."""
    return "?" + str(request.url.remove_query_params("after").query)


# --- rounds ----------------------------------------------------------------------------------


@router.get("/")
def home(request: Request) -> str:
    recipes = browse.rounds(request.app.state.store)
    plots = {name: drawing.rounds(rows, _metric(rows)) for name, rows in recipes.items()}
    return _page(
        request, "home.html", recipes=recipes, plots=plots, metrics={n: _metric(r) for n, r in recipes.items()}
    )


def _metric(rows: list[dict]) -> str:
    """The metric that the recipe's gate looks at now."""
    return rows[-1]["metric"] or "pass_at_1"


@router.get("/recipes/{recipe}/rounds/{key}")
def round_(
    request: Request,
    recipe: str,
    key: str,
    decision: str = "",
    reason: str = "",
    split: str = "train",
    prompt: str = "",
    text: str = "",
    order: str = "prompt",
    after: After = None,
) -> str:
    store = request.app.state.store
    rows = browse.rounds(store, recipe).get(recipe, [])
    row = next((row for row in rows if row["round"] == key), None)
    if row is None:
        raise AuditError(f"{recipe} has no round {key}.")
    asked = browse.Asked(decision, reason, split, prompt.strip(), text, order)
    decided = browse.decisions(store, recipe, key)
    page = browse.candidates(store, recipe, key, asked, after)
    return _page(
        request,
        "round.html",
        row=row,
        rounds=rows,
        decided=decided,
        scores=decided.scores and drawing.histogram(decided.scores),
        asked=asked,
        page=page,
        following=_following(request, page),
        after=after,
        first=_first(request),
        reasons=[("", "any"), *((reason, reason) for reason in sorted(decided.reasons))],
        matching=_matching(asked, decided),
    )


def _matching(asked: browse.Asked, decided: browse.Decisions) -> int | None:
    """How many candidates a list has, where the numbers by reason say so; None where counting takes a search."""
    if asked.text or asked.prompt or asked.split == "eval" or asked.decision == "undecided":
        return None
    accepted = {"": (True, False), "accepted": (True,), "rejected": (False,)}[asked.decision]
    return sum(
        number
        for reason, number in decided.reasons.items()
        if (reason == "accepted") in accepted and asked.reason in ("", reason)
    )


# --- one thing -------------------------------------------------------------------------------


@router.get("/recipes/{recipe}/prompts/{prompt_id}")
def prompt(request: Request, recipe: str, prompt_id: str, after: After = None) -> str:
    store = request.app.state.store
    page = browse.drawn_for(store, recipe, prompt_id, after)
    return _page(
        request,
        "prompt.html",
        prompt=_prompt(request, recipe, prompt_id),
        page=page,
        after=after,
        first=_first(request),
        following=_following(request, page),
    )


def _prompt(request: Request, recipe: str, prompt_id: str) -> dict:
    rows = request.app.state.store.query(
        "SELECT * FROM prompts WHERE recipe = $recipe AND prompt_id = $prompt", {"recipe": recipe, "prompt": prompt_id}
    )
    if not rows:
        raise AuditError(f"{recipe} has no prompt {prompt_id}.")
    return rows[0]


@router.get("/recipes/{recipe}/prompts/{prompt_id}/text", response_class=PlainTextResponse)
def whole_prompt(request: Request, recipe: str, prompt_id: str) -> str:
    return _prompt(request, recipe, prompt_id)["text"]


# --- refused rows, and anything --------------------------------------------------------------


@router.get("/quarantine")
def quarantine(request: Request, recipe: str = "", reason: str = "", after: After = None) -> str:
    store = request.app.state.store
    page = browse.quarantine(store, recipe or None, reason or None, after)
    return _page(
        request,
        "quarantine.html",
        refusals=browse.refusals(store),
        recipe=recipe,
        reason=reason,
        page=page,
        after=after,
        first=_first(request),
        following=_following(request, page),
    )


@router.get("/find")
def find(request: Request, q: str = "") -> Response:
    """To the thing that has this id; or the prompts that contain these words."""
    store, wanted = request.app.state.store, q.strip()
    if found := browse.named(store, wanted):
        kind, recipe, identity = found
        return RedirectResponse({"round": to.round_}.get(kind, getattr(to, kind, None))(recipe, identity))
    found = browse.prompts_with(store, wanted) if wanted else []
    return HTMLResponse(_page(request, "find.html", wanted=wanted, found=found))
