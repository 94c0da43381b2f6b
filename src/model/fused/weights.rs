//! A group's weights as its products take them: laid out for each use in one buffer, or once, in memory of their own.
//!
//! Resident weights cost two bytes a weight instead of half a byte, and save a pass over all of them forward and another
//! backward. Their numbers are the same: what is laid out is the dequantised weight either way.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::Fused;
use super::group::{Group, GroupName};
use super::plan::Sizes;
use super::product::At;
use super::workspace::matrix;
use crate::kernels::nf4::dequantize_into;
use crate::model::layer::DecoderLayer;
use crate::model::linear::BaseWeight;

/// Weights of every layer's groups, `[out + ranks, in + ranks]`, as in [`super::group`].
#[derive(Debug)]
pub(super) struct Resident(Vec<[Tensor; 4]>);

impl Resident {
    /// Lays out all weights; the layers' projections become views into them.
    ///
    /// # Errors
    /// When the memory does not suffice.
    pub(super) fn new(
        sizes: &Sizes,
        layers: &mut [DecoderLayer],
        kind: Kind,
        device: Device,
    ) -> Result<Self> {
        let mut all = Vec::with_capacity(layers.len());
        for layer in layers {
            let mut of_layer = Vec::with_capacity(GroupName::ALL.len());
            for group in &sizes.groups {
                let shape = [group.output() + group.ranks(), group.input + group.ranks()];
                let whole = Tensor::f_zeros(shape, (kind, device))?;
                lay_out_base(group, layer, &whole)?;
                for member in &group.members {
                    let here = whole.narrow(0, member.row, member.rows).narrow(1, 0, group.input);
                    // What lay there before is freed layer by layer: both never lie there whole.
                    layer.projection_mut(member.projection).base = BaseWeight::Dense(here);
                }
                of_layer.push(whole);
            }
            if let Ok(of_layer) = of_layer.try_into() {
                all.push(of_layer);
            }
        }
        Ok(Self(all))
    }

    /// The group's weights in a layer.
    fn of(&self, at: At<'_>) -> Option<Tensor> {
        let place = GroupName::ALL.iter().position(|one| *one == at.group.name)?;
        Some(self.0.get(at.index)?[place].shallow_clone())
    }
}

impl Fused {
    /// Brings resident weights up to date with their adapters; others are laid out anew at each use.
    pub(in crate::model) fn adapters_changed(&self, layers: &[DecoderLayer]) -> Result<()> {
        if let Some(host) = &self.host_adapter {
            host.forget()?;
        }
        let Some(resident) = &self.resident else { return Ok(()) };
        for (index, layer) in layers.iter().enumerate() {
            if let Some(host) = &self.host_adapter {
                host.bring(index)?;
            }
            for name in GroupName::ALL {
                let at = self.at(name, index, layer);
                if let Some(whole) = resident.of(at) {
                    self.lay_out_adapters(at, &whole)?;
                }
            }
        }
        Ok(())
    }

    /// The group's weights, laid out now unless they always are; `adapted`: with its adapters.
    pub(super) fn lay_out(&self, at: At<'_>, adapted: bool) -> Result<Tensor> {
        if let Some(whole) = self.resident.as_ref().and_then(|resident| resident.of(at)) {
            return Ok(whole);
        }
        let At { group, layer, .. } = at;
        let whole = self.laid_out(at);
        lay_out_base(group, layer, &whole)?;
        if !adapted || group.ranks() == 0 {
            return Ok(whole);
        }
        let filled = at.adapted().count() == 1 && group.members.len() == 1 && !group.is_padded();
        if !filled {
            let (outputs, width, ranks) = (group.output(), group.input, group.ranks());
            let _ = whole.narrow(1, width, ranks).f_zero_()?;
            let _ = whole.narrow(0, outputs, ranks).f_zero_()?;
        }
        self.lay_out_adapters(at, &whole)?;
        Ok(whole)
    }

    /// Beside and under the base's weights; what lies between the members' own places stays.
    fn lay_out_adapters(&self, at: At<'_>, whole: &Tensor) -> Result<()> {
        let (outputs, width) = (at.group.output(), at.group.input);
        for (member, adapter) in at.adapted() {
            let [a, b] = match &self.host_adapter {
                Some(host) => host.of(at.index, [adapter.a_slot, adapter.b_slot])?,
                None => [adapter.a.shallow_clone(), adapter.b.shallow_clone()],
            };
            let column = width + member.column;
            whole.narrow(0, member.row, member.rows).narrow(1, column, member.rank).f_copy_(&b)?;
            whole.narrow(0, outputs + member.column, member.rank).narrow(1, 0, width).f_copy_(&a)?;
        }
        Ok(())
    }

    /// The group's weights as they were laid out last.
    pub(super) fn laid_out(&self, at: At<'_>) -> Tensor {
        if let Some(whole) = self.resident.as_ref().and_then(|resident| resident.of(at)) {
            return whole;
        }
        let ranks = at.group.ranks();
        matrix(&self.workspace.weight, at.group.output() + ranks, at.group.input + ranks)
    }
}

fn lay_out_base(group: &Group, layer: &DecoderLayer, whole: &Tensor) -> Result<()> {
    for member in &group.members {
        let mut to = whole.narrow(0, member.row, member.rows).narrow(1, 0, group.input);
        match &layer.projection(member.projection).base {
            BaseWeight::Nf4(weight) => dequantize_into(weight, &to)?,
            BaseWeight::Dense(weight) => to.f_copy_(weight)?,
        }
    }
    Ok(())
}
