//! Trainable parameters: names and shapes over one flat allocation.
//!
//! Adapter, gradients and moments share one layout, so the optimiser is a pass over flat memory and
//! a checkpoint is a list of named views. Parameters may lie in the host's memory while gradients lie on a GPU.

use tch::{Device, Kind, Tensor};

/// Where a parameter lies in the flat allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSlot {
    /// `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    /// Shape; `lora_A` is `[rank, in]`, `lora_B` is `[out, rank]`, as in PEFT.
    pub shape: Vec<i64>,
    /// First element.
    pub offset: i64,
}

impl ParamSlot {
    /// Number of elements.
    pub fn len(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Named views of one flat f32 tensor.
#[derive(Debug)]
pub struct ParamSet {
    slots: Vec<ParamSlot>,
    /// `[elements]` f32.
    flat: Tensor,
    /// `[elements]` bf16.
    rounded: Option<Tensor>,
}

impl ParamSet {
    /// Zeros for parameters of these names and shapes.
    pub fn zeros(parameters: impl IntoIterator<Item = (String, Vec<i64>)>, device: Device) -> Self {
        let mut offset = 0;
        let slots: Vec<ParamSlot> = parameters
            .into_iter()
            .map(|(name, shape)| {
                let slot = ParamSlot { name, shape, offset };
                offset += slot.len();
                slot
            })
            .collect();
        Self { slots, flat: Tensor::zeros([offset], (Kind::Float, device)), rounded: None }
    }

    /// Zeros in the same layout, where the parameters lie.
    pub fn zeros_like(&self) -> Self {
        self.over(self.flat.zeros_like())
    }

    /// Zeros in the same layout: gradients, which lie where the computation is.
    pub fn zeros_on(&self, device: Device) -> Self {
        self.over(Tensor::zeros(self.flat.size(), (Kind::Float, device)))
    }

    /// The same layout over another allocation, `[elements]` f32.
    pub fn over(&self, flat: Tensor) -> Self {
        Self { slots: self.slots.clone(), flat, rounded: None }
    }

    /// The same, with a copy in bf16 that an optimiser keeps up to date.
    pub(super) fn with_rounded(self, rounded: Tensor) -> Self {
        Self { rounded: Some(rounded), ..self }
    }

    /// The parameters in bf16, `[elements]`, where an optimiser is to write them too.
    pub fn rounded(&self) -> Option<&Tensor> {
        self.rounded.as_ref()
    }

    /// The layout.
    pub fn slots(&self) -> &[ParamSlot] {
        &self.slots
    }

    /// The flat allocation, `[elements]` f32; writing to it writes the parameters.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// The parameter at `index` of [`slots`](Self::slots) as a view in its shape.
    pub fn view(&self, index: usize) -> Tensor {
        self.view_of(&self.flat, index)
    }

    /// The same view of another allocation in this layout: a copy in another dtype.
    pub(super) fn view_of(&self, flat: &Tensor, index: usize) -> Tensor {
        let slot = &self.slots[index];
        flat.narrow(0, slot.offset, slot.len()).view(slot.shape.as_slice())
    }

    /// Index of a parameter by name.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.slots.iter().position(|slot| slot.name == name)
    }

    /// Names and views, in layout order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Tensor)> + '_ {
        self.slots.iter().enumerate().map(|(index, slot)| (slot.name.as_str(), self.view(index)))
    }
}
