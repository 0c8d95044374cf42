"""The audit pages over HTTP: what they list, that no text of a model acts on them, and which requests may write."""

import json
import re
from functools import partial
from html import unescape
from html.parser import HTMLParser

import letters_store as letters
import pytest
from fastapi.testclient import TestClient

from rsft_pipeline import lineage, report, rounds
from rsft_pipeline.audit import browse, words
from rsft_pipeline.audit.ids import thing
from rsft_pipeline.audit.revoke import revoke
from rsft_pipeline.home import Home
from web.app import create

HERE = "http://127.0.0.1:5001"
ROUND = f"/recipes/{letters.RECIPE}/rounds/r000"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with letters.write(tmp_path_factory.mktemp("home")) as written:
        yield written


@pytest.fixture
def ask(store, tmp_path):
    """Ask for a page: it must be there, and carry the headers of every page."""
    with TestClient(create(store, Home(tmp_path)), base_url=HERE, follow_redirects=False) as client:

        def get(path, status=200, **more):
            answer = client.get(path, **more)
            assert answer.status_code == status, answer.text
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "script-src" not in answer.headers["content-security-policy"]
            return answer

        yield get


def rows(page):
    """The candidates that a page lists, by id."""
    return re.findall(r'<td class="i"><a class="id" href="[^"]*/candidates/([0-9a-f]{32})"', page.text)


def every_row(ask, path):
    """The candidates of all pages of a list."""
    found = []
    while path:
        page = ask(path)
        found += rows(page)
        link = re.search(r'href="([^"]*)" rel="next"', page.text)
        path = path.partition("?")[0] + unescape(link[1]) if link else None
    return found


# --- lists -----------------------------------------------------------------------------------


def ids(draws, prompts=range(letters.PROMPTS), key="r000", split="train"):
    return {letters.candidate_id(key, prompt, draw, split) for prompt in prompts for draw in draws}


@pytest.mark.parametrize("order", browse.ORDERS)
def test_paging_gives_every_candidate_once_in_every_order(ask, order):
    found = every_row(ask, f"{ROUND}?order={order}")
    assert len(found) == letters.PROMPTS * letters.DRAWS == 80
    assert set(found) == ids(range(letters.DRAWS))


def test_orders(ask, store):
    score_of = {row["candidate_id"]: row for row in store.query("SELECT * FROM decisions WHERE round = 'r000'")}
    best = [score_of[one]["score"] for one in every_row(ask, f"{ROUND}?order=best")]
    assert best == [1.0] * 40 + [0.25] * 20 + [None] * 20
    worst = [score_of[one]["score"] for one in every_row(ask, f"{ROUND}?order=worst")]
    assert worst == [0.25] * 20 + [1.0] * 40 + [None] * 20
    chances = [score_of[one]["u"] for one in every_row(ask, f"{ROUND}?order=u")]
    assert chances == sorted(chances)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("decision=accepted", ids([0])),
        ("decision=rejected", ids([1, 2, 3])),
        ("decision=undecided", set()),
        ("reason=below+threshold", ids([2])),
        ("reason=duplicate&decision=accepted", set()),
        ("decision=accepted&order=shortest", ids([0])),
        ("split=eval&order=best", ids(range(4), range(2), split="eval")),
        ("text=ANSWER+12+", ids(range(4), [12])),
        ("text=%3Cscript", ids([0], [0])),
        ("text=answer+12&decision=rejected", ids([1, 2, 3], [12])),
        (f"prompt={letters.prompt_id(3)}", ids(range(4), [3])),
        ("prompt='+OR+1%3D1+--", set()),
    ],
)
def test_filters(ask, filters, expected):
    assert set(every_row(ask, f"{ROUND}?{filters}")) == expected


@pytest.mark.parametrize(
    "nonsense", ["order=size", "decision=perhaps", "after=1", 'after=["x", 3]', "order=u&after=[]"]
)
def test_an_address_that_no_page_gave_is_not_there(ask, nonsense):
    ask(f"{ROUND}?{nonsense}", status=404)


def test_a_round_in_numbers(ask, store):
    decided = browse.decisions(store, letters.RECIPE, "r000")
    assert decided.reasons == {"accepted": 20, "below threshold": 20, "cannot judge": 20, "duplicate": 20}
    assert (decided.scores.low, decided.scores.high) == (0.25, 1.0)
    assert (decided.scores.accepted[-1], decided.scores.rejected[-1], decided.scores.rejected[0]) == (20, 20, 20)
    assert sum(decided.scores.accepted + decided.scores.rejected) == 60
    page = ask(ROUND).text
    assert "80 candidates" in page and "25 %" in page
    assert 'aria-label="candidates by combined score, from 0.25 to 1: 20 accepted, 40 rejected"' in page
    assert 'href="http://127.0.0.1:3000/runs/run-r000"' in page
    assert 'href="http://127.0.0.1:5000/#/runs/mlflow-r000"' in page


def test_a_round_whose_candidates_are_not_decided_on_lists_them(tmp_path):
    with letters.write(tmp_path) as store, TestClient(create(store, Home(tmp_path)), base_url=HERE) as client:
        row = {"recipe": letters.RECIPE, "round": "r002", "state": "started", "policy": letters.BASE}
        store.append("rounds", [{**row, "drawn_from": letters.BASE, "policy_source": "base"}])
        renamed = "* REPLACE ('r002' AS round, md5(candidate_id) AS candidate_id)"
        of = "FROM candidates WHERE round = 'r001' AND split = 'train'"
        store.commit(lambda c: c.execute(f"INSERT INTO candidates SELECT {renamed} {of}"))
        path = f"/recipes/{letters.RECIPE}/rounds/r002"
        assert "0 candidates" not in client.get(path).text
        for asked in ("", "?order=u", "?order=best", "?decision=undecided&order=u", "?order=u&text=answer"):
            assert len(set(every_row(client.get, path + asked))) == 80, asked
        store.commit(lambda c: c.execute("DELETE FROM decisions WHERE round = 'r001' AND reason <> 'accepted'"))
        found = every_row(client.get, f"/recipes/{letters.RECIPE}/rounds/r001?order=u&text=answer")
        assert set(found) == ids(range(4), key="r001") and set(found[:20]) == ids([0], key="r001")


def test_a_last_score_that_cannot_judge_is_the_last_score(tmp_path):
    one = letters.candidate_id("r000", 1, 0, "eval")
    with letters.write(tmp_path) as store:
        again = "SELECT * REPLACE ('another' AS version, NULL AS value) FROM scores"
        store.commit(lambda c: c.execute(f"INSERT INTO scores {again} WHERE candidate_id = ?", [one]))
        shown = browse.candidates(store, letters.RECIPE, "r000", browse.Asked(split="eval")).rows
        assert {row["candidate_id"]: row["score"] for row in shown}[one] is None


def test_a_held_out_candidate_has_its_score_and_no_decision(ask):
    page = ask(f"/recipes/letters/candidates/{letters.candidate_id('r000', 1, 2, 'eval')}").text
    assert "never decided on" in page and "0.25" in page


# --- one thing -------------------------------------------------------------------------------


def test_a_candidate_and_where_it_led(ask):
    page = ask(f"/recipes/letters/candidates/{letters.candidate_id('r000', 9, 0)}").text
    assert "score 1 is above the threshold 0.5" in page
    assert 'role="group" aria-label="lineage"' in page  # an image's links would be hidden
    for address in (
        f"/recipes/letters/prompts/{letters.prompt_id(9)}",
        f"/recipes/letters/checkpoints/{letters.BASE}",
        f"/recipes/letters/checkpoints/{letters.CHECKPOINTS['r000']}",
        f"/recipes/letters/checkpoints/{letters.CHECKPOINTS['r001']}",  # trained on from it
    ):
        assert f'href="{address}"' in page
        ask(address)
    rejected = ask(f"/recipes/letters/candidates/{letters.candidate_id('r000', 9, 1)}").text
    assert "but the same text was kept already for this prompt" in rejected
    assert letters.CHECKPOINTS["r000"] not in rejected


def test_a_checkpoint_and_its_training_set(ask, store):
    address = f"/recipes/letters/checkpoints/{letters.CHECKPOINTS['r000']}"
    assert set(every_row(ask, address)) == ids([0])
    page = ask(address).text
    assert "Made by r000; r001 sampled from it; champion after r000, r001." in page
    # Neither the folder with the weights nor a root of the training set was ever written.
    assert "there is no folder" in unescape(ask(f"{address}?verify=1").text)


def test_what_was_drawn_for_a_prompt_over_the_rounds(ask):
    drawn = every_row(ask, f"/recipes/letters/prompts/{letters.prompt_id(4)}")
    assert drawn == [letters.candidate_id(key, 4, draw) for key in ("r000", "r001") for draw in range(4)]


def test_weights_of_another_recipe_lead_to_it(tmp_path):
    made, one = letters.CHECKPOINTS["r000"], lineage.digest("of mine")
    with letters.write(tmp_path) as store, TestClient(create(store, Home(tmp_path)), base_url=HERE) as client:
        settings = json.dumps({"model": {"source": f"/home/checkpoints/{made}"}})
        of = {"recipe": "mine", "round": "r000", "policy": made}
        store.append("rounds", [{**of, "state": "started", "policy_source": "base", "drawn_from": made,
                                 "settings": settings}])  # fmt: skip
        copied = f"SELECT * REPLACE ('mine' AS recipe, '{one}' AS candidate_id, '{made}' AS policy) FROM candidates"
        store.commit(lambda c: c.execute(f"INSERT INTO candidates {copied} WHERE split = 'train' LIMIT 1"))
        page = client.get(f"/recipes/mine/checkpoints/{made}")
        assert "Made by letters r000; r000 sampled from it." in page.text
        assert set(rows(page)) <= ids([0]) and "/recipes/letters/candidates/" in page.text
        for path in (f"/recipes/mine/checkpoints/{made}", f"/recipes/mine/candidates/{one}"):
            links = set(re.findall(r'href="(/recipes/[^"]*/checkpoints/[^"]*)"', client.get(path).text))
            assert f"/recipes/letters/checkpoints/{letters.BASE}" in links
            assert {client.get(link).status_code for link in links} == {200}
        assert client.get(f"/recipes/mine/checkpoints/{letters.CHECKPOINTS['r001']}").status_code == 404


def test_find(ask):
    one = letters.candidate_id("r001", 2, 1)
    assert ask(f"/find?q={one}", 307).headers["location"] == f"/recipes/letters/candidates/{one}"
    assert ask(f"/find?q={one[:12]}", 307).headers["location"].endswith(one)
    found = ask("/find?q=AFTER+12").text
    assert f"/recipes/letters/prompts/{letters.prompt_id(12)}" in found
    lost = ask("/find?q=nowhere").text
    assert "No prompt contains these words. As an id or a name: no id here begins with it" in lost
    assert "No prompt" not in ask("/find?q=").text and "Type an id" in ask("/find?q=").text


def test_what_is_long_can_be_read_to_its_end_and_what_is_ambiguous_says_so(tmp_path):
    one, end = letters.candidate_id("r000", 5, 0), "AND NOT THE END OF IT"
    with letters.write(tmp_path) as store, TestClient(create(store, Home(tmp_path)), base_url=HERE) as client:
        of = [f"{'r' * 290} {end}", letters.prompt_id(5)]
        store.commit(lambda c: c.execute("UPDATE prompts SET reference = ? WHERE prompt_id = ?", of))
        store.commit(lambda c: c.execute("UPDATE prompts SET source = 'answer' WHERE prompt_id = ?", of[1:]))
        revoke(store, thing(store, one), who="an auditor", why=f"{'because ' * 600}{end}")
        assert end in client.get(f"/recipes/letters/candidates/{one}").text
        assert end in client.get("/revocations").text
        found = unescape(client.get("/find?q=answer").text)
        assert (
            "'answer' could be scorer version-answer, source answer: give the whole id of the one that is meant."
            in found
        )
        found = unescape(client.get("/find?q=combined").text)
        assert "scorer version-combined has no page here" in found


def test_quarantine(ask):
    page = ask("/quarantine?recipe=letters&reason=broken+JSON").text
    assert "letters: 30 broken JSON" in page and r"\xff&lt;script&gt;" in page
    following = unescape(re.search(r'href="([^"]*)" rel="next"', page)[1])
    assert ask(f"/quarantine{following}").text.count("<td>letters.jsonl</td>") == 5


def test_what_can_be_got_can_be_asked_for_without_its_body(store, tmp_path):
    with TestClient(create(store, Home(tmp_path)), base_url=HERE) as client:
        for path, status in (("/", 200), (ROUND, 200), ("/favicon.ico", 200), ("/static/style.css", 200), ("/no", 404)):
            head, got = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (status, b"") and got.content
            assert head.headers == got.headers


def test_what_is_not_there(ask):
    for path in ("/nowhere", "/recipes/x/rounds/r000", "/recipes/letters/rounds/r999", "/recipes/letters/prompts/x",
                 "/recipes/letters/candidates/x", "/recipes/letters/checkpoints/x",
                 "/static/%2e%2e/app.py"):  # fmt: skip
        ask(path, status=404)


# --- safety ----------------------------------------------------------------------------------


def acting(page):
    """The tags and attributes of a page that could run something."""
    found = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.extend([tag] if tag in ("script", "img", "iframe", "object", "embed", "style") else [])
            found.extend(name for name, value in attributes if name.startswith("on") or name == "style")
            found.extend(value for name, value in attributes if name == "href" and value.startswith("javascript:"))

    Parser().feed(page)
    return found


@pytest.mark.parametrize("number", range(len(letters.NASTY)))
def test_what_a_model_wrote_is_text_and_nothing_else(ask, number):
    text, one = letters.NASTY[number], letters.candidate_id("r000", number, 0)
    address = f"/recipes/letters/candidates/{one}"
    listed = ask(f"{ROUND}?prompt={letters.prompt_id(number)}")
    for page in (ask(address), listed):
        assert len(page.content) < 60_000  # however long the text
        assert not acting(page.text) and "1787569" not in page.text
        assert not set("\x00\x1b\u202e\u202c\u2069\u200f") & set(page.text)
    whole = ask(f"{address}/text")
    assert whole.text == text and whole.headers["content-type"] == "text/plain; charset=utf-8"
    assert whole.headers["x-content-type-options"] == "nosniff"


def test_only_this_machine_by_its_own_names_is_answered(ask):
    for host in ("127.0.0.1", "localhost:6001", "[::1]:5001"):
        ask("/", headers={"host": host})
    for host in ("evil.example", "127.0.0.1.evil.example:5001", "", "0.0.0.0", "evil.example@127.0.0.1"):
        assert "answer to 127.0.0.1" in ask("/", 403, headers={"host": host}).text
    for address in ("/search?text=%00", "/candidate/%00"):
        assert "NUL" in ask(address, 403).text


def test_read_only_pages_change_nothing(ask, store):
    one = letters.candidate_id("r000", 5, 0)
    page = ask(f"/recipes/letters/revoke/candidate/{one}").text
    assert "2 checkpoints" in page or "<dd>2</dd>" in page  # r000's own, and r001's that started from it
    assert "read only" in page and '<form class="confirm"' not in page
    before = store.snapshot()
    with TestClient(create(store, Home(store.data)), base_url=HERE) as client:
        for token in ("", "None"):
            form = {"token": token, "who": "a", "why": "b"}
            address = f"/recipes/letters/revoke/candidate/{one}"
            answer = client.post(address, data=form, headers={"origin": HERE})
            assert answer.status_code == 403 and "read only" in answer.text
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
            assert client.request(method, "/").status_code == 403
    assert store.snapshot() == before


def test_a_round_without_a_value_of_the_metric_of_now_is_left_out_of_the_plots(tmp_path):
    settings = json.loads(letters.RECIPE_AS_RUN.model_dump_json())
    settings["promotion"]["metric"] = "mean_score"
    lacking = json.dumps({"pass_at_1": letters.ESTIMATE, "pass_at_k": letters.ESTIMATE, "mean_score": None})
    with letters.write(tmp_path) as store, TestClient(create(store, Home(tmp_path)), base_url=HERE) as client:
        store.commit(lambda c: c.execute("UPDATE rounds SET settings = ?", [json.dumps(settings)]))
        store.commit(lambda c: c.execute("UPDATE rounds SET checkpoint_eval = ? WHERE round = 'r000'", [lacking]))
        page = client.get("/")
        assert page.status_code == 200 and "r001: 0.500" in page.text and ">r000: 0.500" not in page.text
        assert report.rounds_plot("letters", "mean_score", rounds.history(store, "letters")).startswith(b"\x89PNG")


def test_only_a_form_of_this_server_revokes(tmp_path):
    one = letters.candidate_id("r000", 5, 0)
    address = f"/recipes/letters/revoke/candidate/{one}"
    with (
        letters.write(tmp_path) as store,
        TestClient(
            create(store, Home(tmp_path), revoke=partial(revoke, store)), base_url=HERE, follow_redirects=False
        ) as client,
    ):
        token = re.search(r'name="token" value="([^"]{40,})"', client.get(address).text)[1]
        form = {"token": token, "who": "an auditor", "why": f"personal data {letters.SCRIPT}"}

        def post(**changed):
            headers = {"origin": changed.pop("origin", HERE), "host": changed.pop("host", "127.0.0.1:5001")}
            sent = {name: value for name, value in {**form, **changed}.items() if value is not None}
            return client.post(address, data=sent, headers={k: v for k, v in headers.items() if v is not None})

        before = store.snapshot()
        assert post(token=None).status_code == 403
        assert post(token="x" * 43).status_code == 403
        assert post(token="é").status_code == 403
        assert post(origin=None).status_code == 403
        assert post(origin="null").status_code == 403
        assert post(origin="http://evil.example").status_code == 403
        assert post(origin="http://127.0.0.1:8000").status_code == 403  # another server of this machine
        assert post(host="evil.example", origin="http://evil.example").status_code == 403
        assert post(why="x" * 50_000).status_code == 403
        refused = post(why=" ", who="<b>Ada", erase="on")
        assert refused.status_code == 422 and "Nothing was revoked. Please say why." in refused.text
        assert 'value="&lt;b&gt;Ada"' in refused.text and 'name="erase" checked' in refused.text
        assert "say who is responsible and why" in post(who="", why=None).text
        assert store.snapshot() == before and store.query("SELECT * FROM revocations") == []

        assert post().headers["location"] == "/revocations"
        rows = store.query("SELECT kind, what, who, cause, erased FROM revocations ORDER BY cause NULLS FIRST, what")
        assert rows[0] == {"kind": "candidate", "what": one, "who": "an auditor", "cause": None, "erased": False}
        assert {row["what"] for row in rows[1:]} == set(letters.CHECKPOINTS.values())
        page = client.get("/revocations").text
        assert one in page and "personal data &lt;script&gt;" in page and not acting(page)
        assert "was revoked by an auditor" in client.get(f"/recipes/letters/candidates/{one}").text
        assert "revoked: to run again" in client.get("/").text
        assert client.get(f"{ROUND}?prompt={letters.prompt_id(5)}").text.count(">revoked<") == 1


# --- a decision in words ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "log_a", "rule", "expected"),
    [
        ("accepted", -0.342490308946776, {"rule": "rejection"}, "p/(M·q) = 0.71 > u = 0.33"),
        ("accepted", 0.0, {"rule": "rejection"}, "p/(M·q) ≥ 1 > u = 0.33"),
        ("u >= A", -2.0, {"rule": "boltzmann", "beta": 0.5}, "exp((score − r_max)/β) (β = 0.5) = 0.1353 ≤ u = 0.33"),
        ("duplicate", -0.1, {"rule": "loss", "k": 2}, "loss/k (k = 2) = 0.9048 > u = 0.33, but the same text was "
         "kept already for this prompt"),
        ("below threshold", -2.0, {"rule": "rejection", "threshold": 0.2},
         "p/(M·q) = 0.1353 is not above the threshold 0.2"),
        ("below threshold", None, {"rule": "threshold", "threshold": 0.8}, "score 0.7 is not above the threshold 0.8"),
        ("rank", None, {"rule": "top_k", "k": 4}, "score 0.7 is not among the 4 best of its prompt"),
        ("accepted", None, {"rule": "quantile", "share": 0.1, "cut": 1200},
         "score 0.7 is among the best 10 % of the round, which are 1,200 candidates"),
        ("cap", None, {"rule": "threshold", "threshold": 0.5, "cap": 2},
         "score 0.7 is above the threshold 0.5, but its prompt has its share of 2 already"),
    ],
)  # fmt: skip
def test_a_decision_in_words(reason, log_a, rule, expected):
    row = {"accepted": reason == "accepted", "reason": reason, "score": 0.7, "log_a": log_a, "u": 0.33}
    assert words.decision({**row, "parameters": json.dumps(rule)}) == expected


def test_a_store_that_fails_is_said_on_the_page(tmp_path):
    with letters.write(tmp_path) as store, TestClient(create(store, Home(tmp_path)), base_url=HERE) as client:
        for file in (tmp_path / "store").rglob("*.parquet"):
            file.write_bytes(b"PAR1 nothing that DuckDB can read PAR1")
        answer = client.get(f"{ROUND}")
        assert answer.status_code == 500 and f"The store of {tmp_path} failed" in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
