//! Asking a task's questions through the engine, greedily, and judging the answers.

use std::collections::VecDeque;

use anyhow::{Context as _, Result, bail};

use super::results::Results;
use super::task::{Answered, Judgement, Prompt, Question, Task, Verdict};
use crate::data::example::Message;
use crate::engine::{EngineHandle, FinishReason, Generation, Request, Sampling, SubmitError, TokenStream};
use crate::progress;

/// Questions in the engine at once; its queue must hold as many.
pub const UNDER_WAY: usize = 8;

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

/// A question on its way through the engine.
struct Asked {
    at: usize,
    question: Question,
    prompt_tokens: usize,
    answer: Result<TokenStream, SubmitError>,
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
    check_order(task, results.all())?;
    let bar = progress::bar(task.len() as u64, task.name(), "questions");
    bar.inc(results.all().len() as u64);
    let mut under_way = VecDeque::new();
    let mut left = results.all().len()..task.len();
    loop {
        // As many as the engine takes: it need not wait for a prompt while there is one.
        while under_way.len() < UNDER_WAY
            && let Some(at) = left.next()
        {
            under_way.push_back(submit(at, task, engine, speaker)?);
        }
        let Some(asked) = under_way.pop_front() else { break };
        let id = asked.question.id.clone();
        let answered = conclude(asked, task, speaker).with_context(|| format!("{} {id}", task.name()))?;
        results.push(answered)?;
        let correct = results.all().iter().filter(|one| one.verdict == Verdict::Correct).count();
        bar.set_message(format!("{correct} correct"));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Results lie in the order of the questions, so that the next one is known by their number.
pub(super) fn check_order(task: &dyn Task, results: &[Answered]) -> Result<()> {
    if results.len() > task.len() {
        bail!("there are {} results of {}, which asks {} questions", results.len(), task.name(), task.len());
    }
    for (at, result) in results.iter().enumerate() {
        let id = task.question(at)?.id;
        if result.id != id {
            bail!("result {} of {} is of question `{}`, expected `{id}`", at + 1, task.name(), result.id);
        }
    }
    Ok(())
}

fn submit(at: usize, task: &dyn Task, engine: &EngineHandle, speaker: &Speaker<'_>) -> Result<Asked> {
    let question = task.question(at)?;
    let in_question = || format!("cannot ask {} {}", task.name(), question.id);
    let prompt = match &question.prompt {
        Prompt::Chat(messages) => (speaker.encode)(messages).with_context(in_question)?,
        Prompt::Tokens(tokens) => tokens.clone(),
    };
    let request = Request {
        prompt,
        max_tokens: task.max_tokens(),
        sampling: Sampling::GREEDY,
        stop_token_ids: speaker.stop_token_ids.clone(),
    };
    let prompt_tokens = request.prompt.len();
    match engine.submit(request) {
        Err(error @ (SubmitError::Stopped | SubmitError::Overloaded { .. } | SubmitError::Invalid(_))) => {
            Err(error).with_context(in_question)
        }
        answer => Ok(Asked { at, question, prompt_tokens, answer }),
    }
}

fn conclude(asked: Asked, task: &mut dyn Task, speaker: &Speaker<'_>) -> Result<Answered> {
    let Asked { at, question, prompt_tokens, answer } = asked;
    let measures = task.measures();
    let (answer, completion_tokens, finished, judgement) = match answer {
        Err(error) => (String::new(), 0, false, not_asked(measures.len(), error.to_string())),
        Ok(stream) => {
            let generation: Generation = stream.wait()?;
            let answer = (speaker.decode)(&generation.ids())?;
            let judgement = task.judge(at, &answer)?;
            let ended = generation.finished;
            (answer, ended.usage.completion_tokens, ended.reason == FinishReason::Stop, judgement)
        }
    };
    let Judgement { extracted, verdict, error, scores } = judgement;
    let Question { id, group, text, reference, .. } = question;
    let scores = measures.iter().map(|name| (*name).to_string()).zip(scores).collect();
    Ok(Answered {
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

fn not_asked(measures: usize, error: String) -> Judgement {
    Judgement {
        extracted: String::new(),
        verdict: Verdict::NotAsked,
        error: Some(error),
        scores: vec![0.0; measures],
    }
}
