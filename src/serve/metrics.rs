//! Counters in Prometheus' text format (version 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Upper bounds of the latency buckets in seconds: from a token on a GPU to a long answer on a CPU.
const BOUNDS: [f64; 14] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// What the service counts.
#[derive(Debug, Default)]
pub struct Metrics {
    /// By route and status.
    requests: Mutex<BTreeMap<(String, u16), u64>>,
    prompt_tokens: AtomicU64,
    completion_tokens: AtomicU64,
    /// Answers whose client went away or whose generation failed.
    unfinished: AtomicU64,
    duration: Histogram,
    first_token: Histogram,
    retrieval: Histogram,
}

/// What the engine is doing at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Requests that are answered.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
}

impl Metrics {
    /// A request was answered with a status.
    pub fn request(&self, route: &str, status: u16) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry((route.to_string(), status)).or_default() += 1;
    }

    /// An answer came to its end.
    pub fn answer(&self, prompt_tokens: usize, completion_tokens: usize, duration: Duration) {
        self.prompt_tokens.fetch_add(prompt_tokens as u64, Ordering::Relaxed);
        self.completion_tokens.fetch_add(completion_tokens as u64, Ordering::Relaxed);
        self.duration.observe(duration);
    }

    /// An answer did not come to its end after so many tokens.
    pub fn unfinished(&self, completion_tokens: usize) {
        self.completion_tokens.fetch_add(completion_tokens as u64, Ordering::Relaxed);
        self.unfinished.fetch_add(1, Ordering::Relaxed);
    }

    /// The first token of an answer came so long after its request.
    pub fn first_token(&self, after: Duration) {
        self.first_token.observe(after);
    }

    /// Documents were retrieved.
    pub fn retrieval(&self, duration: Duration) {
        self.retrieval.observe(duration);
    }

    /// Seconds after which a refused client may well try again: what one answer takes.
    pub fn retry_after(&self) -> u64 {
        (self.duration.mean().ceil() as u64).clamp(1, 60)
    }

    /// Everything as text.
    pub fn render(&self, load: Load) -> String {
        let mut text = String::new();
        let version = env!("CARGO_PKG_VERSION");
        family(&mut text, "granite_build_info", "gauge", "The program.");
        line(&mut text, "granite_build_info", &format!("version=\"{version}\""), 1);
        family(&mut text, "granite_http_requests_total", "counter", "Requests by route and status.");
        for ((route, status), count) in self.requests.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let labels = format!("route=\"{}\",status=\"{status}\"", escape(route));
            line(&mut text, "granite_http_requests_total", &labels, *count);
        }
        let counters = [
            ("granite_prompt_tokens_total", "Prompt tokens of finished answers.", &self.prompt_tokens),
            ("granite_generation_tokens_total", "Generated tokens.", &self.completion_tokens),
            (
                "granite_requests_unfinished_total",
                "Answers whose client went away or that failed.",
                &self.unfinished,
            ),
        ];
        for (name, help, value) in counters {
            family(&mut text, name, "counter", help);
            line(&mut text, name, "", value.load(Ordering::Relaxed));
        }
        let gauges = [
            ("granite_requests_running", "Requests that are being answered.", load.running),
            ("granite_requests_waiting", "Requests in the queue.", load.waiting),
        ];
        for (name, help, value) in gauges {
            family(&mut text, name, "gauge", help);
            line(&mut text, name, "", value as u64);
        }
        let histograms = [
            ("granite_request_duration_seconds", "From the request to its last token.", &self.duration),
            (
                "granite_time_to_first_token_seconds",
                "From the request to its first token.",
                &self.first_token,
            ),
            ("granite_retrieval_duration_seconds", "Encoding a question and searching.", &self.retrieval),
        ];
        for (name, help, histogram) in histograms {
            family(&mut text, name, "histogram", help);
            histogram.render(&mut text, name);
        }
        text
    }
}

/// Durations by bucket.
#[derive(Debug, Default)]
struct Histogram {
    /// The last one holds what is beyond all bounds.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    microseconds: AtomicU64,
}

impl Histogram {
    fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.microseconds.fetch_add(duration.as_micros() as u64, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    fn sum(&self) -> f64 {
        self.microseconds.load(Ordering::Relaxed) as f64 / 1e6
    }

    /// In seconds; 0 before the first.
    fn mean(&self) -> f64 {
        self.sum() / self.count().max(1) as f64
    }

    fn render(&self, text: &mut String, name: &str) {
        let mut below = 0;
        let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_string()]);
        for (bucket, bound) in self.buckets.iter().zip(bounds) {
            below += bucket.load(Ordering::Relaxed);
            line(text, &format!("{name}_bucket"), &format!("le=\"{bound}\""), below);
        }
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{name}_sum {}", self.sum());
        line(text, &format!("{name}_count"), "", below);
    }
}

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(text: &mut String, name: &str, labels: &str, value: u64) {
    let _ = match labels {
        "" => writeln!(text, "{name} {value}"),
        labels => writeln!(text, "{name}{{{labels}}} {value}"),
    };
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
