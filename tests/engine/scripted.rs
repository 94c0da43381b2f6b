//! A model whose likeliest next token is the last one plus one, and a gate that holds it still.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use granite::engine::CausalLm;
use granite::model::continuation::Continuation;

/// Holds the model at its first step until it is opened.
#[derive(Clone)]
pub struct Gate(Arc<(Mutex<(bool, bool)>, Condvar)>);

impl Gate {
    pub fn closed() -> Self {
        Self(Arc::new((Mutex::new((false, false)), Condvar::new())))
    }

    pub fn open(&self) {
        self.0.0.lock().unwrap().1 = true;
        self.0.1.notify_all();
    }

    pub fn wait_until_reached(&self) {
        drop(self.0.1.wait_while(self.0.0.lock().unwrap(), |(reached, _)| !*reached).unwrap());
    }

    fn pass(&self) {
        let mut state = self.0.0.lock().unwrap();
        state.0 = true;
        self.0.1.notify_all();
        drop(self.0.1.wait_while(state, |(_, open)| !*open).unwrap());
    }
}

pub struct Counting {
    vocabulary: usize,
    context: usize,
    gate: Option<Gate>,
    pause: Duration,
    failing: Option<u32>,
    panicking: Option<u32>,
    steps: Option<Steps>,
    memory: Option<usize>,
}

/// A capacity at which the allocator panics, as one of libtorch's may.
pub const UNALLOCATABLE: usize = 13;

/// How many tokens of each sequence went through the model, step by step.
pub type Steps = Arc<Mutex<Vec<Vec<usize>>>>;

impl Counting {
    pub fn new(vocabulary: usize, context: usize) -> Self {
        let pause = Duration::ZERO;
        let (gate, failing, panicking, steps, memory) = (None, None, None, None, None);
        Self { vocabulary, context, gate, pause, failing, panicking, steps, memory }
    }

    pub fn behind(self, gate: &Gate) -> Self {
        Self { gate: Some(gate.clone()), ..self }
    }

    pub fn counted(self, steps: &Steps) -> Self {
        Self { steps: Some(Arc::clone(steps)), ..self }
    }

    pub fn slow(self, pause: Duration) -> Self {
        Self { pause, ..self }
    }

    /// Without memory for a cache of more tokens.
    pub fn with_memory(self, tokens: usize) -> Self {
        Self { memory: Some(tokens), ..self }
    }

    pub fn failing_at(self, token: u32) -> Self {
        Self { failing: Some(token), ..self }
    }

    pub fn panicking_at(self, token: u32) -> Self {
        Self { panicking: Some(token), ..self }
    }
}

impl CausalLm for Counting {
    /// Tokens seen, and how many there is room for.
    type Cache = (Vec<u32>, usize);

    fn context(&self) -> usize {
        self.context
    }

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn new_cache(&self, capacity: usize) -> Result<Self::Cache> {
        ensure!(self.memory.is_none_or(|memory| capacity <= memory), "out of memory");
        assert!(capacity != UNALLOCATABLE, "an allocator that panics");
        Ok((Vec::new(), capacity))
    }

    fn forward_cached(&self, batch: &mut [Continuation<'_, Self::Cache>]) -> Result<Vec<Vec<f32>>> {
        if let Some(gate) = &self.gate {
            gate.pass();
        }
        std::thread::sleep(self.pause);
        if let Some(steps) = &self.steps {
            steps.lock().unwrap().push(batch.iter().map(|one| one.input_ids.len()).collect());
        }
        batch.iter_mut().map(|one| self.after(one.input_ids, one.cache)).collect()
    }
}

impl Counting {
    fn after(&self, input_ids: &[u32], (seen, capacity): &mut (Vec<u32>, usize)) -> Result<Vec<f32>> {
        seen.extend(input_ids);
        assert!(seen.len() <= *capacity, "{} tokens in a cache of {capacity}", seen.len());
        let last = *seen.last().unwrap();
        if self.failing == Some(last) {
            bail!("no token follows {last}");
        }
        assert!(self.panicking != Some(last), "token {last}");
        let mut logits = vec![0.0; self.vocabulary];
        logits[(last as usize + 1) % self.vocabulary] = 4.0;
        Ok(logits)
    }
}
