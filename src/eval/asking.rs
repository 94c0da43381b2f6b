//! Asking a task's questions through the engine, greedily, and judging the answers.
//!
//! The longest prompts are asked first: sequences that are answered side by side are then of one length, the caches are
//! largest at the start, and the last ones running end soon. Results are put back into the order of the questions.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use tokio_stream::{StreamExt as _, StreamMap};

use super::results::Results;
use super::task::{Answered, Judgement, Prompt, Question, Task, Verdict};
use crate::data::example::Message;
use crate::engine::{
    EngineHandle, Event, FinishReason, Finished, Request, Sampling, SubmitError, TokenStream,
};
use crate::progress;

/// Questions handed to an engine that answers `batch` at once; its queue must hold as many. The next ones wait there, so
/// that a place that becomes free is taken while the answer that left it is judged.
pub fn under_way(batch: usize) -> usize {
    batch.saturating_mul(2)
}

/// How messages become tokens and tokens become text.
pub struct Speaker<'a> {
    /// Messages up to where the assistant speaks.
    pub encode: &'a dyn Fn(&[Message]) -> Result<Vec<u32>>,
    /// An answer as text, without special tokens.
    pub decode: &'a dyn Fn(&[u32]) -> Result<String>,
    /// Tokens that end an answer.
    pub stop_token_ids: Vec<u32>,
}

impl std::fmt::Debug for Speaker<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Speaker").field("stop_token_ids", &self.stop_token_ids).finish_non_exhaustive()
    }
}

/// Asks what is not among the results yet; each answer is in the file as soon as it is judged.
///
/// # Errors
/// When the results are of other questions, a prompt cannot be built, the engine fails, or a file cannot be written.
pub fn ask(
    task: &mut dyn Task,
    engine: &EngineHandle,
    speaker: &Speaker<'_>,
    results: &mut Results<Answered>,
) -> Result<()> {
    let places = places(task)?;
    let left = left(task, speaker, &places, results.all())?;
    let progress = Progress::new(task, results.all());
    let mut asking = Asking { task, engine, speaker, results, progress, left, asked: BTreeMap::new() };
    let runtime = tokio::runtime::Builder::new_current_thread().build().context("cannot wait for answers")?;
    runtime.block_on(asking.run())?;
    results.sort_by_key(|one| places.get(&one.id).copied().unwrap_or(usize::MAX))
}

/// Where each question stands in the task, by its name.
fn places(task: &dyn Task) -> Result<BTreeMap<String, usize>> {
    let mut places = BTreeMap::new();
    for at in 0..task.len() {
        let id = task.question(at)?.id;
        if let Some(other) = places.insert(id.clone(), at) {
            bail!("questions {} and {} of {} are both called `{id}`", other + 1, at + 1, task.name());
        }
    }
    Ok(places)
}

/// A question that is to be asked.
#[derive(Debug)]
struct Unasked {
    at: usize,
    prompt: Vec<u32>,
}

/// The questions that have no result, the longest prompt first.
fn left(
    task: &dyn Task,
    speaker: &Speaker<'_>,
    places: &BTreeMap<String, usize>,
    results: &[Answered],
) -> Result<VecDeque<Unasked>> {
    let mut answered = BTreeSet::new();
    for (line, Answered { id, .. }) in (1..).zip(results) {
        let Some(at) = places.get(id) else {
            bail!("result {line} of {} is of question `{id}`, which is not asked", task.name());
        };
        if !answered.insert(*at) {
            bail!("result {line} of {} is of question `{id}`, which has one already", task.name());
        }
    }
    let unanswered = (0..task.len()).filter(|at| !answered.contains(at));
    let mut left = unanswered
        .map(|at| Ok(Unasked { at, prompt: prompt_of(&task.question(at)?, task.name(), speaker)? }))
        .collect::<Result<Vec<_>>>()?;
    left.sort_by_key(|one| Reverse(one.prompt.len()));
    Ok(left.into())
}

fn prompt_of(question: &Question, task: &str, speaker: &Speaker<'_>) -> Result<Vec<u32>> {
    match &question.prompt {
        Prompt::Chat(messages) => {
            (speaker.encode)(messages).with_context(|| format!("cannot ask {task} {}", question.id))
        }
        Prompt::Tokens(tokens) => Ok(tokens.clone()),
    }
}

/// A question that the engine has.
#[derive(Debug)]
struct Asked {
    question: Question,
    prompt_tokens: usize,
    /// Token ids of the answer so far.
    said: Vec<u32>,
}

/// A task that is being asked.
struct Asking<'a> {
    task: &'a mut dyn Task,
    engine: &'a EngineHandle,
    speaker: &'a Speaker<'a>,
    results: &'a mut Results<Answered>,
    progress: Progress,
    left: VecDeque<Unasked>,
    /// By its place in the task.
    asked: BTreeMap<usize, Asked>,
}

impl Asking<'_> {
    async fn run(&mut self) -> Result<()> {
        let mut streams = StreamMap::new();
        loop {
            while self.asked.len() < under_way(self.engine.batch())
                && let Some(next) = self.left.pop_front()
            {
                let at = next.at;
                if let Some(stream) = self.submit(next)? {
                    streams.insert(at, stream);
                }
            }
            let Some((at, event)) = streams.next().await else { break };
            self.hear(at, event)?;
        }
        match self.asked.values().next() {
            Some(asked) => bail!("{} {}: the engine stopped", self.task.name(), asked.question.id),
            None => Ok(()),
        }
    }

    /// Hands a question to the engine. One that does not fit is judged as such.
    fn submit(&mut self, Unasked { at, prompt }: Unasked) -> Result<Option<TokenStream>> {
        let question = self.task.question(at)?;
        let prompt_tokens = prompt.len();
        let request = Request {
            prompt,
            max_tokens: self.task.max_tokens(),
            sampling: Sampling::GREEDY,
            stop_token_ids: self.speaker.stop_token_ids.clone(),
        };
        let refused = self.engine.submit(request);
        let asked = Asked { question, prompt_tokens, said: Vec::new() };
        match refused {
            Ok(stream) => {
                self.asked.insert(at, asked);
                Ok(Some(stream))
            }
            Err(error @ SubmitError::PromptTooLong { .. }) => {
                let judgement = not_asked(self.task.measures().len(), error.to_string());
                self.conclude(asked, String::new(), false, judgement)?;
                Ok(None)
            }
            Err(error) => {
                Err(error).with_context(|| format!("cannot ask {} {}", self.task.name(), asked.question.id))
            }
        }
    }

    fn hear(&mut self, at: usize, event: Event) -> Result<()> {
        match event {
            Event::Token(token) => {
                if let Some(asked) = self.asked.get_mut(&at) {
                    asked.said.push(token.id);
                }
                self.progress.token();
                Ok(())
            }
            Event::Finished(finished) => self.judge(at, finished),
            Event::Failed(reason) => {
                let id = self.asked.remove(&at).map(|asked| asked.question.id).unwrap_or_default();
                bail!("{} {id}: generation failed: {reason}", self.task.name())
            }
        }
    }

    fn judge(&mut self, at: usize, finished: Finished) -> Result<()> {
        let Some(asked) = self.asked.remove(&at) else { return Ok(()) };
        let in_question = format!("{} {}", self.task.name(), asked.question.id);
        let mut judged = || {
            let answer = (self.speaker.decode)(&asked.said)?;
            let judgement = self.task.judge(at, &answer)?;
            anyhow::Ok((answer, judgement))
        };
        let (answer, judgement) = judged().context(in_question)?;
        self.conclude(asked, answer, finished.reason == FinishReason::Stop, judgement)
    }

    fn conclude(&mut self, asked: Asked, answer: String, finished: bool, judgement: Judgement) -> Result<()> {
        let Judgement { extracted, verdict, error, scores } = judgement;
        let Asked { question: Question { id, group, text, reference, .. }, prompt_tokens, said } = asked;
        let scores = self.task.measures().iter().map(|name| (*name).to_string()).zip(scores).collect();
        let completion_tokens = said.len();
        self.progress.answer(verdict);
        self.results.push(Answered {
            id,
            group,
            question: text,
            reference,
            answer,
            extracted,
            verdict,
            scores,
            error,
            prompt_tokens,
            completion_tokens,
            finished,
        })
    }
}

fn not_asked(measures: usize, error: String) -> Judgement {
    Judgement {
        extracted: String::new(),
        verdict: Verdict::NotAsked,
        error: Some(error),
        scores: vec![0.0; measures],
    }
}

/// Questions answered, how many of them right, and how fast tokens come.
#[derive(Debug)]
struct Progress {
    bar: ProgressBar,
    started: Instant,
    tokens: usize,
    correct: usize,
}

impl Progress {
    fn new(task: &dyn Task, before: &[Answered]) -> Self {
        let bar = progress::bar(task.len() as u64, task.name(), "questions");
        bar.set_position(before.len() as u64);
        bar.reset_eta();
        let correct = before.iter().filter(|one| one.verdict == Verdict::Correct).count();
        Self { bar, started: Instant::now(), tokens: 0, correct }
    }

    fn token(&mut self) {
        self.tokens += 1;
        self.tell();
    }

    fn answer(&mut self, verdict: Verdict) {
        self.correct += usize::from(verdict == Verdict::Correct);
        self.bar.inc(1);
        self.tell();
    }

    fn tell(&self) {
        let rate = self.tokens as f64 / self.started.elapsed().as_secs_f64();
        self.bar.set_message(format!("{} correct, {rate:.0} tokens/s", self.correct));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
