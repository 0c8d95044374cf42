"""Pages: what is on each of the audit pages.

Belongs here: for each address, what is read from rsft_pipeline/audit, and which template shows it. Not: how it is
read (rsft_pipeline/audit), what it looks like (templates/), nor which requests are served (app.py).
"""

from itertools import pairwise
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from resources import pages as to
from rsft_pipeline.audit import browse, ids
from rsft_pipeline.audit import impact as following
from rsft_pipeline.audit import trace as tracing
from rsft_pipeline.audit import verify as verifying
from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.evaluation import shown
from rsft_pipeline.report import NAMES
from rsft_pipeline.rounds import row_of
from rsft_pipeline.steps.evaluate import over_controls
from web import drawing
from web.show import render

PAGE_OF = {"candidate": to.candidate, "prompt": to.prompt, "checkpoint": to.checkpoint}
router = APIRouter(default_response_class=HTMLResponse)
After = Annotated[str | None, Query()]


def around(request: Request) -> dict[str, Any]:
    """What every page shows around its content, for the template."""
    state, asked_for = request.app.state, request.query_params.get("q", "")
    return {"home": str(state.home.path), "token": state.token, "at": request.url.path, "asked_for": asked_for}


def _page(request: Request, template: str, **values: Any) -> str:
    return render(template, **around(request), **values)


def _following(request: Request, page: browse.Page) -> str | None:
    """The address of the next page of a list."""
    if page.following is None:
        return None
    return "?" + str(request.url.remove_query_params("verify").include_query_params(after=page.following).query)


def _first(request: Request) -> str:
    """The address of the first page of a list."""
    return "?" + str(request.url.remove_query_params(["after", "verify"]).query)


# --- rounds ----------------------------------------------------------------------------------


@router.get("/")
def home(request: Request) -> str:
    recipes = browse.rounds(request.app.state.store)
    plots = {name: drawing.rounds(rows, _metric(rows)) for name, rows in recipes.items()}
    return _page(
        request, "home.html", recipes=recipes, plots=plots, metrics={n: _metric(r) for n, r in recipes.items()}
    )


def _metric(rows: list[dict]) -> str:
    """The promotion metric of the recipe's last round."""
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
    decided = browse.decisions(store, recipe, key)
    if not (decided.reasons or decision or reason) and split == "train":
        decision = "undecided"  # all of its candidates are, until it has decisions
    asked = browse.Asked(decision, reason, split, prompt.strip(), text, order)
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
        over={
            role: f"{NAMES[one.metric]} {shown(one.difference, one.low, one.high)}"
            for role, one in over_controls(store.query, row_of(store, recipe, key)).items()
        },
    )


def _matching(asked: browse.Asked, decided: browse.Decisions) -> int | None:
    """How many candidates a list has, from the numbers by reason; None if these do not tell."""
    if asked.text or asked.prompt or asked.split == "eval" or asked.decision == "undecided":
        return None
    accepted = {"": (True, False), "accepted": (True,), "rejected": (False,)}[asked.decision]
    return sum(
        number
        for reason, number in decided.reasons.items()
        if (reason == "accepted") in accepted and asked.reason in ("", reason)
    )


# --- one thing -------------------------------------------------------------------------------


@router.get("/recipes/{recipe}/candidates/{candidate_id}")
def candidate(request: Request, recipe: str, candidate_id: str) -> str:
    found = tracing.trace(request.app.state.store, candidate_id, recipe)
    return _page(request, "candidate.html", trace=found, chain=_chain(found))


def _chain(found: tracing.Trace) -> drawing.Chain:
    """The graph of a candidate: what it came from, how it was judged and decided on, and what learned from it."""
    Node, recipe, asked, weights = drawing.Node, found.recipe, found.prompt, found.weights
    source, prompt_ = Node("source", "not in the store"), Node("prompt", "not in the store")
    if asked:
        page = to.prompt(recipe, asked.prompt_id)
        source = Node("source", asked.source, page, more=f"line {asked.line:,}")
        prompt_ = Node("prompt", asked.text or "erased", page, more=f"split {asked.split}")
    this = Node(
        "candidate",
        "erased" if found.draw.text is None else found.draw.text or "∅",
        kind="this",
        more=f"{found.round}, draw {found.draw.draw}",
    )
    columns, edges = [[source], [prompt_], [this]], [(source, prompt_), (prompt_, this)]
    parent = "base model" if len(weights) <= 2 else f"parent, {len(weights) - 2} before it"
    for one, title, column in zip(weights, ("policy", parent), (1, 0), strict=False):
        node = Node(title, one.digest[:8], to.checkpoint(one.recipe, one.digest), more=one.source)
        edges.append((node, columns[column + 1][-1]))
        columns[column].append(node)
    if found.scores:
        last = ([one for one in found.scores if one.decided_by] or found.scores)[-1]
        value = "cannot judge" if last.value is None else f"{last.value:.4g}"
        scorers = ", ".join(dict.fromkeys(score.scorer for score in found.scores[:-1]))
        columns.append([Node("score", value, "#scores", more=scorers)])
    if decided := found.decision:
        kind = "yes" if decided.accepted else "no"
        columns.append([Node("decision", decided.reason, "#decision", kind, f"u = {decided.u:.4g}")])
    edges += [(before[0], after[0]) for before, after in pairwise(columns[2:])]
    trained = [one for one in found.learned if one.weight is not None]
    if trained:
        made = [
            Node(one.role, one.checkpoint[:8], to.checkpoint(one.recipe, one.checkpoint), more=one.round)
            for one in trained[:3]
        ]
        if len(trained) > 3:
            made.append(Node("checkpoints", f"{len(trained) - 3} more", "#learned"))
        edges += [(columns[-1][0], node) for node in made]
        columns.append(made)
        if later := len(found.learned) - len(trained):
            columns.append([Node("later checkpoints", f"{later} from these", "#learned", more=found.learned[-1].round)])
            edges += [(node, columns[-1][0]) for node in made]
    return drawing.chain(columns, edges)


@router.get("/recipes/{recipe}/candidates/{candidate_id}/text", response_class=PlainTextResponse)
def whole_candidate(request: Request, recipe: str, candidate_id: str) -> str:
    return tracing.trace(request.app.state.store, candidate_id, recipe).draw.text or ""


@router.get("/recipes/{recipe}/candidates/{candidate_id}/tokens", response_class=PlainTextResponse)
def whole_tokens(request: Request, recipe: str, candidate_id: str) -> str:
    return " ".join(map(str, tracing.trace(request.app.state.store, candidate_id, recipe).draw.token_ids or ()))


@router.get("/recipes/{recipe}/checkpoints/{digest}")
def checkpoint(request: Request, recipe: str, digest: str, verify: bool = False, after: After = None) -> str:
    state = request.app.state
    weights = browse.weights(state.store, recipe, digest)
    page = browse.trained_on(state.store, weights.row["recipe"], digest, after) if weights.row else None
    verification = None
    if verify and weights.row:
        verification = verifying.verify(state.store, weights.row, state.home, state.witnesses(weights.row))
    return _page(
        request,
        "checkpoint.html",
        recipe=recipe,
        weights=weights,
        verification=verification,
        page=page,
        after=after,
        first=_first(request),
        following=page and _following(request, page),
    )


@router.get("/recipes/{recipe}/prompts/{prompt_id}")
def prompt(request: Request, recipe: str, prompt_id: str, after: After = None) -> str:
    page = browse.drawn_for(request.app.state.store, recipe, prompt_id, after)
    return _page(
        request,
        "prompt.html",
        prompt=_prompt(request, recipe, prompt_id),
        revoked=browse.revoked(request.app.state.store, recipe, prompt_id),
        page=page,
        after=after,
        first=_first(request),
        following=_following(request, page),
    )


def _prompt(request: Request, recipe: str, prompt_id: str) -> dict:
    found = browse.prompt(request.app.state.store, recipe, prompt_id)
    if found is None:
        raise AuditError(f"{recipe} has no prompt {prompt_id}.")
    return found


@router.get("/recipes/{recipe}/prompts/{prompt_id}/text", response_class=PlainTextResponse)
def whole_prompt(
    request: Request,
    recipe: str,
    prompt_id: str,
    part: Literal["text", "reference", "fields", "messages"] = "text",
) -> str:
    return _prompt(request, recipe, prompt_id)[part] or ""


# --- refused rows, and search ----------------------------------------------------------------


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
    """Leads to the thing with this id, or else lists the prompts that contain these words."""
    store, wanted = request.app.state.store, q.strip()
    try:
        thing = ids.thing(store, wanted)
        if page := PAGE_OF.get(thing.kind):
            return RedirectResponse(page(thing.recipes[0], thing.what))
        why = f"{thing.words} has no page here: use `rsft audit impact`."
    except ids.Ambiguous as error:
        why = f"{error}."
    except AuditError:
        why = f"no id here begins with it (give {ids.SHORTEST} digits or more)."
    found = browse.prompts_with(store, wanted) if wanted else []
    return HTMLResponse(_page(request, "find.html", wanted=wanted, found=found, why=why))


# --- taking something out of use --------------------------------------------------------------


@router.get("/revocations")
def revocations(request: Request, after: After = None) -> str:
    page = browse.revocations(request.app.state.store, after)
    return _page(
        request,
        "revocations.html",
        page=page,
        after=after,
        first=_first(request),
        following=_following(request, page),
    )


@router.get("/recipes/{recipe}/revoke/{kind}/{what}")
def confirm(request: Request, recipe: str, kind: str, what: str) -> str:
    """What a revocation would reach, and a form to confirm it."""
    return _confirm(request, recipe, _thing(request, recipe, kind, what), {})


def _confirm(request: Request, recipe: str, thing: ids.Thing, form: dict[str, str], lacking: str = "") -> str:
    found = following.impact(request.app.state.store, thing)
    here = PAGE_OF[thing.kind](recipe, thing.what)
    return _page(request, "revoke.html", recipe=recipe, impact=found, here=here, form=form, lacking=lacking)


@router.post("/recipes/{recipe}/revoke/{kind}/{what}")
def revoke(request: Request, recipe: str, kind: str, what: str) -> Response:
    """Revoke it. That this is allowed, and was asked for by a page of this server, app.py has checked."""
    form, thing = request.state.form, _thing(request, recipe, kind, what)
    who, why = form.get("who", ""), form.get("why", "")
    blank = [name for name, typed in (("who is responsible", who), ("why", why)) if not typed.strip()]
    if blank:
        return HTMLResponse(_confirm(request, recipe, thing, form, " and ".join(blank)), status_code=422)
    request.app.state.revoke(thing, who=who, why=why, erase="erase" in form)
    return RedirectResponse("/revocations", status_code=303)


def _thing(request: Request, recipe: str, kind: str, what: str) -> ids.Thing:
    """A thing that has a page here, by its whole id. Raises AuditError if this recipe has no such thing."""
    found = ids.thing(request.app.state.store, what)
    if kind not in PAGE_OF or (found.kind, found.what) != (kind, what) or recipe not in found.recipes:
        raise AuditError(f"{recipe} has no {kind} {what}.")
    return found
