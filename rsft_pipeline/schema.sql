-- The lineage tables. Each row says which recipe and, where it applies, which round and which
-- Dagster run wrote it. Ids are content hashes (lineage.py); DuckLake has no keys of its own, so
-- writers replace (delete, then insert in one transaction) or skip what is there.

CREATE TABLE IF NOT EXISTS prompts (
    recipe VARCHAR, prompt_id VARCHAR,
    text VARCHAR,            -- as the tokenizer gets it
    chat BOOLEAN,            -- rendered by a chat template: already carries its special tokens
    messages VARCHAR,        -- JSON list of turns, for chat prompts
    reference VARCHAR,       -- the reference answer, if the source has one
    fields VARCHAR,          -- JSON of the row's mapped columns
    question VARCHAR,        -- id of what is asked, in whatever words: of the values of the text's columns
    same_text VARCHAR,       -- id of the text, whatever its spaces; null: prompt_id is that
    split VARCHAR,           -- 'train', or 'eval': held out for ever
    content VARCHAR,         -- digest of text, reference and fields: what scorers see of it
    source VARCHAR, line BIGINT,
    settings VARCHAR,        -- digest of the recipe's section `prompts` that the sources were read by
    source_digest VARCHAR,   -- of all that was read with it
    active BOOLEAN,          -- there when the sources were last read, not revoked; only such prompts are drawn from
    dagster_run_id VARCHAR
);

-- Where a prompt was read from before, by another name of its source than it has now.
CREATE TABLE IF NOT EXISTS earlier_sources (
    recipe VARCHAR, prompt_id VARCHAR, source VARCHAR, line BIGINT, dagster_run_id VARCHAR
);

CREATE TABLE IF NOT EXISTS quarantine (
    recipe VARCHAR, source VARCHAR, line BIGINT,
    raw BLOB,                -- the row's bytes, untouched
    reason VARCHAR, detail VARCHAR, dagster_run_id VARCHAR
);

-- The prompts that a round draws from (split 'train') and is evaluated on ('eval').
CREATE TABLE IF NOT EXISTS round_prompts (
    recipe VARCHAR, round VARCHAR, prompt_id VARCHAR, split VARCHAR, dagster_run_id VARCHAR
);

CREATE TABLE IF NOT EXISTS candidates (
    recipe VARCHAR, round VARCHAR, candidate_id VARCHAR, prompt_id VARCHAR,
    split VARCHAR,           -- of its prompt; 'eval' candidates are never trained on
    origin VARCHAR,          -- 'policy', 'teacher', or 'reference': the reference answer, as the policy rates it
    policy VARCHAR,          -- digest of the weights it was drawn from (of a reference: that rated it)
    draw INTEGER, wave INTEGER,
    text VARCHAR, token_ids INTEGER[], tokens INTEGER,
    finish_reason VARCHAR,   -- 'stop' (a stop token, which is in token_ids) or 'length'
    log_q DOUBLE,            -- under the distribution sampled from (temperature, top-k, top-p); NULL: not sampled
    log_p DOUBLE,            -- under those weights as they are
    seed BIGINT, settings VARCHAR, dagster_run_id VARCHAR
);

CREATE TABLE IF NOT EXISTS scores (
    recipe VARCHAR, round VARCHAR, candidate_id VARCHAR,
    scorer VARCHAR,          -- 'combined' is what the rule sees
    version VARCHAR,         -- hash of the scorer's source and settings
    content VARCHAR,         -- of the prompt as it was judged by: another reference means another score
    value DOUBLE,            -- NULL: it could not judge
    passed BOOLEAN,          -- of 'combined': every gate was reached
    dagster_run_id VARCHAR
);

CREATE TABLE IF NOT EXISTS decisions (
    recipe VARCHAR, round VARCHAR, candidate_id VARCHAR, prompt_id VARCHAR,
    accepted BOOLEAN, reason VARCHAR,
    score DOUBLE, log_a DOUBLE, u DOUBLE, weight DOUBLE,
    parameters VARCHAR,      -- JSON: the rule, its settings, and what it estimated
    dagster_run_id VARCHAR
);

CREATE TABLE IF NOT EXISTS checkpoints (
    recipe VARCHAR, round VARCHAR, checkpoint VARCHAR,
    parent VARCHAR,          -- digest of the weights training started from
    policy VARCHAR,          -- digest of the round's policy
    drawn_from VARCHAR,      -- digest of the weights its candidates came from: the policy's, or a teacher's
    trained_on VARCHAR,      -- 'accepted', or for a control 'random' or 'everything'
    path VARCHAR, accepted_digest VARCHAR, samples BIGINT, steps BIGINT, loss DOUBLE,
    snapshot BIGINT,         -- of the lake: its tables as they were when training read them
    meta VARCHAR,            -- JSON, as in the checkpoint's meta.json
    mlflow_run_id VARCHAR, dagster_run_id VARCHAR
);

CREATE TABLE IF NOT EXISTS training_samples (
    recipe VARCHAR, round VARCHAR, checkpoint VARCHAR, candidate_id VARCHAR, weight DOUBLE,
    leaf VARCHAR,            -- hash of all that training took of it (merkle.py); meta's merkle_root is over these
    dagster_run_id VARCHAR
);

CREATE TABLE IF NOT EXISTS evaluations (
    recipe VARCHAR, round VARCHAR,
    role VARCHAR,            -- 'policy', 'checkpoint', the 'champion' it is measured against, or a control
    checkpoint VARCHAR,      -- digest of the weights evaluated
    prompt_id VARCHAR, draws INTEGER, passes INTEGER, score DOUBLE, distinct_texts INTEGER, tokens DOUBLE,
    eligible INTEGER,        -- draws that were judged and passed every gate
    dagster_run_id VARCHAR
);

CREATE TABLE IF NOT EXISTS rounds (
    recipe VARCHAR, round VARCHAR,
    state VARCHAR,           -- 'started', 'finished', or 'revoked': to be run again
    policy VARCHAR, policy_source VARCHAR, checkpoint VARCHAR, champion VARCHAR,
    drawn_from VARCHAR,      -- digest of the weights that candidates come from: the policy's, or a teacher's
    answers VARCHAR,         -- digest of the reference answers, where they are the round's candidates
    controls VARCHAR,        -- JSON: digest of each control checkpoint
    scorers VARCHAR,         -- JSON: the version of each scorer that its decisions rest on
    promoted BOOLEAN, verdict VARCHAR,
    candidates BIGINT, accepted BIGINT, distinct_accepted BIGINT, tokens BIGINT,
    -- JSON summaries with their intervals; the champion's is as it stands after the round
    policy_eval VARCHAR, checkpoint_eval VARCHAR, champion_eval VARCHAR,
    settings VARCHAR,        -- JSON: the whole recipe as it ran
    recipe_digest VARCHAR,
    started_at TIMESTAMPTZ, finished_at TIMESTAMPTZ,
    mlflow_run_id VARCHAR, dagster_run_id VARCHAR
);

-- What may no longer be trained on, from then on (revocations.py). The rows of other tables stay as they are.
CREATE TABLE IF NOT EXISTS revocations (
    recipe VARCHAR,          -- '*': prompts and texts of every recipe, also of those to come
    kind VARCHAR,            -- 'candidate', 'prompt', 'source', 'scorer', 'checkpoint', 'text' or 'refused'
    what VARCHAR,            -- its id, name, version or digest; of a text: itself, or if erased its SHA-256, as of the
                             -- bytes of a refused row that had it
    cause VARCHAR,           -- of what was reached by the revocation of something else: its kind and `what`
    who VARCHAR, why VARCHAR, revoked_at TIMESTAMPTZ,
    erased BOOLEAN           -- its text is no more in the tables as they are now
);

-- Columns that a store from before them lacks.
ALTER TABLE prompts ADD COLUMN IF NOT EXISTS question VARCHAR;
ALTER TABLE prompts ADD COLUMN IF NOT EXISTS same_text VARCHAR;
ALTER TABLE prompts ADD COLUMN IF NOT EXISTS settings VARCHAR;
ALTER TABLE candidates ADD COLUMN IF NOT EXISTS origin VARCHAR;
ALTER TABLE checkpoints ADD COLUMN IF NOT EXISTS trained_on VARCHAR;
ALTER TABLE training_samples ADD COLUMN IF NOT EXISTS leaf VARCHAR;
ALTER TABLE evaluations ADD COLUMN IF NOT EXISTS eligible INTEGER;
ALTER TABLE rounds ADD COLUMN IF NOT EXISTS drawn_from VARCHAR;
ALTER TABLE rounds ADD COLUMN IF NOT EXISTS answers VARCHAR;
ALTER TABLE rounds ADD COLUMN IF NOT EXISTS controls VARCHAR;
ALTER TABLE rounds ADD COLUMN IF NOT EXISTS scorers VARCHAR;
ALTER TABLE rounds ADD COLUMN IF NOT EXISTS evaluation_scorers VARCHAR;  -- JSON: scorer → version, of the verdict
ALTER TABLE checkpoints ADD COLUMN IF NOT EXISTS drawn_from VARCHAR;
