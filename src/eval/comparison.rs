//! From results to what may be said of them: scores with intervals, and models side by side.

use std::collections::BTreeMap;

use serde::Serialize;

use super::row_losses::RowLosses;
use super::statistics::{self, Interval, Paired};
use super::task::{Answered, Verdict};

/// All results of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// As it was asked for: `base`, `adapter`, `merged`, or a folder.
    pub name: String,
    /// Losses of held-out rows.
    pub losses: Vec<RowLosses>,
    /// Answers by task.
    pub tasks: Vec<TaskResults>,
}

/// A task's results.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskResults {
    /// Name of the task.
    pub name: &'static str,
    /// What is measured; the first is the headline.
    pub measures: &'static [&'static str],
    /// One for each question.
    pub answers: Vec<Answered>,
    /// Questions of the files that were not asked, by reason.
    pub left_out: BTreeMap<String, usize>,
}

/// The losses of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LossSummary {
    /// Packed rows.
    pub rows: usize,
    /// The mean over all supervised tokens.
    pub overall: LossOf,
    /// The same of each source.
    pub sources: Vec<LossOf>,
}

/// The loss of a part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LossOf {
    /// Name of the source, or `all`.
    pub name: String,
    /// Mean of a supervised token, in nats; sequences are resampled.
    pub loss: Interval,
    /// `exp(loss)`, at most `f64::MAX`.
    pub perplexity: f64,
    /// Supervised tokens.
    pub tokens: i64,
    /// Sequences.
    pub sequences: usize,
}

/// The scores of a model in a task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskSummary {
    /// Name of the task.
    pub name: String,
    /// Questions that count.
    pub scored: usize,
    /// By measure, the headline first.
    pub measures: Vec<Measure>,
    /// The same of each group.
    pub groups: Vec<GroupSummary>,
    /// Answers by verdict.
    pub verdicts: BTreeMap<&'static str, usize>,
    /// Answers that were cut at their limit.
    pub cut: usize,
    /// Questions of the files that were not asked, by reason.
    pub left_out: BTreeMap<String, usize>,
}

/// A measure with its mean.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measure {
    /// Such as `execution_accuracy`.
    pub name: &'static str,
    /// In `[0, 1]`; absent when no question counts.
    pub score: Option<Interval>,
}

/// The scores of a group.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupSummary {
    /// Its name.
    pub name: String,
    /// Questions that count.
    pub scored: usize,
    /// By measure.
    pub measures: Vec<Measure>,
}

/// Two models on the same examples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// What is compared with.
    pub first: String,
    /// What is compared.
    pub second: String,
    /// `loss`, or a task.
    pub of: String,
    /// The source or the measure.
    pub measure: String,
    /// Second minus first.
    #[serde(flatten)]
    pub paired: Paired,
}

/// Sums up losses; `None` when no token is supervised.
pub fn losses(rows: &[RowLosses], sources: &[&str], seed: u64) -> Option<LossSummary> {
    let overall = loss_of("all", &parts(rows, None), seed)?;
    let of = |(at, name): (usize, &&str)| loss_of(name, &parts(rows, u16::try_from(at).ok()), seed);
    Some(LossSummary {
        rows: rows.len(),
        overall,
        sources: sources.iter().enumerate().filter_map(of).collect(),
    })
}

/// Nats and tokens of sequences, of one source or of all.
fn parts(rows: &[RowLosses], source: Option<u16>) -> Vec<(f64, f64)> {
    let sequences = rows.iter().flat_map(|row| &row.sequences);
    let chosen = sequences.filter(|one| one.tokens > 0 && source.is_none_or(|source| one.source == source));
    chosen.map(|one| (one.nats, one.tokens as f64)).collect()
}

fn loss_of(name: &str, parts: &[(f64, f64)], seed: u64) -> Option<LossOf> {
    let loss = statistics::ratio(parts, seed)?;
    let tokens = parts.iter().map(|(_, tokens)| *tokens as i64).sum();
    let perplexity = loss.estimate.exp().min(f64::MAX);
    Some(LossOf { name: name.to_string(), loss, perplexity, tokens, sequences: parts.len() })
}

/// Sums up a task.
pub fn task(results: &TaskResults, seed: u64) -> TaskSummary {
    let TaskResults { name, measures, answers, left_out } = results;
    let scored: Vec<&Answered> = answers.iter().filter(|one| one.is_scored()).collect();
    let mut by_group: BTreeMap<&str, Vec<&Answered>> = BTreeMap::new();
    for one in scored.iter().filter(|one| !one.group.is_empty()) {
        by_group.entry(&one.group).or_default().push(one);
    }
    let group = |(name, answers): (&str, Vec<&Answered>)| GroupSummary {
        name: name.to_string(),
        scored: answers.len(),
        measures: means(measures, &answers, seed),
    };
    let mut groups: Vec<GroupSummary> = by_group.into_iter().map(group).collect();
    groups.sort_by_key(|group| rank(&group.name));
    TaskSummary {
        name: (*name).to_string(),
        scored: scored.len(),
        measures: means(measures, &scored, seed),
        groups,
        verdicts: verdicts(answers),
        cut: answers.iter().filter(|one| one.verdict != Verdict::NotAsked && !one.finished).count(),
        left_out: left_out.clone(),
    }
}

/// Spider's classes from easy to hard; other groups stay in the order of their names.
fn rank(group: &str) -> usize {
    ["easy", "medium", "hard", "extra"].iter().position(|name| *name == group).unwrap_or(0)
}

fn means(measures: &[&'static str], answers: &[&Answered], seed: u64) -> Vec<Measure> {
    let of = |name: &'static str| {
        let scores: Vec<f64> = answers.iter().map(|one| one.score(name)).collect();
        Measure { name, score: statistics::mean(&scores, seed) }
    };
    measures.iter().map(|name| of(name)).collect()
}

fn verdicts(answers: &[Answered]) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for one in answers {
        let name = match one.verdict {
            Verdict::Correct => "correct",
            Verdict::Wrong => "wrong",
            Verdict::Failed => "failed",
            Verdict::NotAsked => "not_asked",
            Verdict::GoldFailed => "gold_failed",
        };
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// Every model beside every one that was named before it.
pub fn compare(models: &[Measured], sources: &[&str], seed: u64) -> Vec<Comparison> {
    let pairs =
        models.iter().enumerate().flat_map(|(at, second)| models[..at].iter().map(move |one| (one, second)));
    pairs.flat_map(|(first, second)| compare_two(first, second, sources, seed)).collect()
}

fn compare_two(first: &Measured, second: &Measured, sources: &[&str], seed: u64) -> Vec<Comparison> {
    let comparison = |of: &str, measure: &str, paired: Paired| Comparison {
        first: first.name.clone(),
        second: second.name.clone(),
        of: of.to_string(),
        measure: measure.to_string(),
        paired,
    };
    let mut found = Vec::new();
    let named = sources.iter().enumerate().map(|(at, name)| (*name, u16::try_from(at).ok()));
    for (name, source) in [("all", None)].into_iter().chain(named) {
        let of = |model: &Measured| parts(&model.losses, source);
        let paired = statistics::paired_ratios(&of(first), &of(second), seed);
        found.extend(paired.map(|paired| comparison("loss", name, paired)));
    }
    for task in &first.tasks {
        let Some(other) = second.tasks.iter().find(|other| other.name == task.name) else { continue };
        for measure in task.measures {
            let (a, b) = common(&task.answers, &other.answers, measure);
            let paired = statistics::paired_means(&a, &b, seed);
            found.extend(paired.map(|paired| comparison(task.name, measure, paired)));
        }
    }
    found
}

/// Scores of the questions that count for both.
fn common(first: &[Answered], second: &[Answered], measure: &str) -> (Vec<f64>, Vec<f64>) {
    let others: BTreeMap<&str, &Answered> = second.iter().map(|one| (one.id.as_str(), one)).collect();
    let pairs = first.iter().filter_map(|one| Some((one, *others.get(one.id.as_str())?)));
    let counted = pairs.filter(|(one, other)| one.is_scored() && other.is_scored());
    counted.map(|(one, other)| (one.score(measure), other.score(measure))).unzip()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test says what failed by panicking")]
mod tests {
    use super::super::row_losses::SequenceLoss;
    use super::*;

    fn answered(id: usize, group: &str, verdict: Verdict) -> Answered {
        let right = f64::from(u8::from(verdict == Verdict::Correct));
        Answered {
            id: id.to_string(),
            group: group.to_string(),
            question: String::new(),
            reference: String::new(),
            answer: String::new(),
            extracted: String::new(),
            verdict,
            scores: [("accuracy".to_string(), right)].into(),
            error: None,
            prompt_tokens: 1,
            completion_tokens: 1,
            finished: id != 1,
        }
    }

    fn results(verdicts: &[(&str, Verdict)]) -> TaskResults {
        let answers = verdicts.iter().enumerate().map(|(id, (group, verdict))| answered(id, group, *verdict));
        TaskResults {
            name: "t",
            measures: &["accuracy"],
            answers: answers.collect(),
            left_out: BTreeMap::new(),
        }
    }

    fn row(parts: &[(u16, f64, i64)]) -> RowLosses {
        let sequences = parts.iter().map(|(source, nats, tokens)| SequenceLoss {
            source: *source,
            nats: *nats,
            tokens: *tokens,
        });
        RowLosses { row: 0, sequences: sequences.collect() }
    }

    #[test]
    fn a_task_is_summed_up_by_group_and_verdict() {
        use Verdict::{Correct, Failed, GoldFailed, NotAsked, Wrong};
        let all =
            [("hard", Correct), ("easy", Wrong), ("hard", Failed), ("easy", NotAsked), ("easy", GoldFailed)];
        let found = task(&results(&all), 1);
        assert_eq!((found.scored, found.cut), (4, 1));
        assert_eq!(found.measures[0].score.unwrap().estimate, 0.25);
        let groups: Vec<(&str, usize, f64)> = found
            .groups
            .iter()
            .map(|group| (group.name.as_str(), group.scored, group.measures[0].score.unwrap().estimate))
            .collect();
        assert_eq!(groups, [("easy", 2, 0.0), ("hard", 2, 0.5)]);
        assert_eq!(found.verdicts.values().sum::<usize>(), 5);
        assert_eq!(task(&results(&[]), 1).measures[0].score, None);
    }

    #[test]
    fn losses_are_summed_up_by_source() {
        let rows = [row(&[(0, 2.0, 2), (2, 3.0, 1)]), row(&[(0, 4.0, 2), (1, 0.0, 0)])];
        let found = losses(&rows, &["a", "b", "c"], 1).unwrap();
        assert_eq!((found.overall.loss.estimate, found.overall.tokens, found.overall.sequences), (1.8, 5, 3));
        let sources: Vec<(&str, f64)> =
            found.sources.iter().map(|one| (one.name.as_str(), one.loss.estimate)).collect();
        assert_eq!(sources, [("a", 1.5), ("c", 3.0)]);
        assert_eq!(losses(&[row(&[(0, 0.0, 0)])], &["a"], 1), None);
    }

    #[test]
    fn models_meet_on_the_questions_they_have_in_common() {
        use Verdict::{Correct, GoldFailed, Wrong};
        let model = |name: &str, verdicts: &[(&str, Verdict)], nats: f64| Measured {
            name: name.to_string(),
            losses: vec![row(&[(0, nats, 2), (0, 2.0 * nats, 2)])],
            tasks: vec![results(verdicts)],
        };
        let models = [
            model("base", &[("", Wrong), ("", Wrong), ("", GoldFailed), ("", Correct)], 2.0),
            model("adapter", &[("", Correct), ("", Wrong), ("", Correct)], 1.0),
        ];
        let found = compare(&models, &["a"], 1);
        let accuracy = found.iter().find(|one| one.of == "t").unwrap();
        assert_eq!((accuracy.first.as_str(), accuracy.second.as_str()), ("base", "adapter"));
        assert_eq!((accuracy.paired.examples, accuracy.paired.larger, accuracy.paired.smaller), (2, 1, 0));
        let loss = found.iter().find(|one| one.of == "loss" && one.measure == "all").unwrap();
        assert_eq!(loss.paired.difference.estimate, -0.75);
        assert_eq!(compare(&models[..1], &["a"], 1), []);
    }
}
