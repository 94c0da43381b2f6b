//! A group's products: forward, gradient of the input, gradients of the adapters.

use anyhow::{Context as _, Result};
use tch::Tensor;

use super::Fused;
use super::group::{Group, GroupName, Member};
use super::pass::Pass;
use super::workspace::matrix;
use crate::kernels::dropout::{dropout_add_rows, dropout_rows_into};
use crate::model::layer::DecoderLayer;
use crate::model::linear::Adapter;
use crate::model::params::ParamSet;

/// A group in one layer.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) group: &'a Group,
    pub(super) index: usize,
    pub(super) layer: &'a DecoderLayer,
    /// Columns of the layer's adapter inputs before the group's.
    pub(super) column: i64,
}

/// What the gradients of a group's adapters are made of.
#[derive(Clone, Copy)]
pub(super) struct AdapterOperands<'a> {
    /// Gradient of the outputs with `s · dY·B` beside it, `[tokens, out + ranks]`.
    pub(super) dy: &'a Tensor,
    /// The group's input, `[tokens, in]`.
    pub(super) x: &'a Tensor,
    /// What the layer keeps of adapter inputs.
    pub(super) xa: &'a Tensor,
    /// `[tokens, in]`, for the dropped input.
    pub(super) spare: &'a Tensor,
}

impl<'a> At<'a> {
    /// Members that have an adapter.
    pub(super) fn adapted(self) -> impl Iterator<Item = (&'a Member, &'a Adapter)> {
        let layer = self.layer;
        let adapter = move |member: &'a Member| {
            layer.projection(member.projection).adapter.as_ref().map(|adapter| (member, adapter))
        };
        self.group.members.iter().filter_map(adapter)
    }

    /// The adapter's factor, the same for every member.
    fn scale(self) -> f64 {
        self.adapted().next().map_or(1.0, |(_, adapter)| adapter.scale)
    }

    /// The group's columns of what the layer keeps of adapter inputs, `[tokens, ranks]`.
    fn xa(self, kept: &Tensor) -> Tensor {
        kept.narrow(1, self.column, self.group.ranks())
    }
}

impl Fused {
    pub(super) fn at<'a>(&'a self, name: GroupName, index: usize, layer: &'a DecoderLayer) -> At<'a> {
        let before = GroupName::ALL.iter().position(|one| *one == name).unwrap_or(0);
        let column = self.sizes.groups[..before].iter().map(Group::ranks).sum();
        At { group: self.sizes.group(name), index, layer, column }
    }

    /// The input of a group as it stands in the workspace, with room for its adapters' columns, `[tokens, in + ranks]`.
    pub(super) fn input_of(&self, group: &Group, tokens: i64) -> Tensor {
        matrix(&self.workspace.input, tokens, group.input + group.ranks())
    }

    /// `y = [x | s·x·Aᵀ] · [W | B]ᵀ` for `input` `[tokens, in + ranks]`, which holds `x`; keeps `s·x·Aᵀ` in it and in `xa`.
    pub(super) fn forward_product(
        &self,
        at: At<'_>,
        input: &Tensor,
        xa: &Tensor,
        y: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<()> {
        let At { group, .. } = at;
        let (width, ranks) = (group.input, group.ranks());
        let weight = self.lay_out(at, pass.adapted)?;
        self.clock.mark("dequantise")?;
        let (outputs, x) = (group.output(), input.narrow(1, 0, width));
        if !pass.adapted || ranks == 0 {
            self.gemm.multiply(&x, &weight.narrow(0, 0, outputs).narrow(1, 0, width).tr(), y, 1.0, 0.0)?;
            return self.clock.mark("products");
        }
        self.adapter_input(at, input, xa, pass)?;
        self.gemm.multiply(input, &weight.narrow(0, 0, outputs).tr(), y, 1.0, 0.0)?;
        self.clock.mark("products")
    }

    /// `s · drop(x)·Aᵀ` of `input`, beside it and in `xa`; the group's weights are laid out.
    pub(super) fn adapter_input(
        &self,
        at: At<'_>,
        input: &Tensor,
        xa: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<()> {
        let At { group, .. } = at;
        let (width, ranks) = (group.input, group.ranks());
        if ranks == 0 {
            return Ok(());
        }
        let (x, spare) = (input.narrow(1, 0, width), input.narrow(1, width, ranks));
        let a = self.laid_out(at).narrow(0, group.output(), ranks).narrow(1, 0, width);
        if group.is_padded() {
            let _ = spare.shallow_clone().f_zero_()?;
        }
        if pass.dropout.is_some() {
            for (member, adapter) in at.adapted() {
                let dropped = matrix(&self.workspace.inner, pass.tokens, width);
                self.drop_into(at, member, &x, &dropped, pass)?;
                let to = spare.narrow(1, member.column, member.rank);
                let a = a.narrow(0, member.column, member.rank);
                self.gemm.multiply(&dropped, &a.tr(), &to, adapter.scale, 0.0)?;
            }
        } else {
            self.gemm.multiply(&x, &a.tr(), &spare, at.scale(), 0.0)?;
        }
        at.xa(xa).f_copy_(&spare)?;
        self.clock.mark("adapter")
    }

    /// Lays out the group's weights and puts `s · dY·B` into the spare columns of `dy` `[tokens, out + ranks]`.
    pub(super) fn through_b(&self, at: At<'_>, dy: &Tensor) -> Result<()> {
        let weight = self.lay_out(at, true)?;
        self.clock.mark("dequantise")?;
        let spare = dy.narrow(1, at.group.output(), at.group.ranks());
        if at.group.is_padded() {
            let _ = spare.shallow_clone().f_zero_()?;
        }
        for (member, adapter) in at.adapted() {
            let to = spare.narrow(1, member.column, member.rank);
            let b = weight.narrow(0, member.row, member.rows);
            let b = b.narrow(1, at.group.input + member.column, member.rank);
            self.gemm.multiply(&dy.narrow(1, member.row, member.rows), &b, &to, adapter.scale, 0.0)?;
        }
        self.clock.mark("adapter")
    }

    /// `dx = factor · [dY | s·dY·B] · [W; A]`, after [`through_b`](Self::through_b). With dropout the adapters' part goes
    /// through their masks, by way of `spare` `[tokens, in]`.
    pub(super) fn input_gradient(
        &self,
        at: At<'_>,
        dy: &Tensor,
        dx: &Tensor,
        spare: &Tensor,
        factor: f64,
        pass: &Pass<'_>,
    ) -> Result<()> {
        let At { group, .. } = at;
        let (outputs, width) = (group.output(), group.input);
        let weight = self.laid_out(at).narrow(1, 0, width);
        if pass.dropout.is_none() {
            self.gemm.multiply(dy, &weight, dx, factor, 0.0)?;
            return self.clock.mark("products");
        }
        self.gemm.multiply(&dy.narrow(1, 0, outputs), &weight.narrow(0, 0, outputs), dx, factor, 0.0)?;
        self.clock.mark("products")?;
        for (member, adapter) in at.adapted() {
            let through_b = dy.narrow(1, outputs + member.column, member.rank);
            let a = weight.narrow(0, outputs + member.column, member.rank);
            self.gemm.multiply(&through_b, &a, spare, factor, 0.0)?;
            let key = self.key(at, member, pass).context("a mask without a key")?;
            dropout_add_rows(dx, spare, adapter.dropout, key)?;
        }
        self.clock.mark("adapter")
    }

    /// Adds `dB = factor · dYᵀ·xa` and `dA = factor · (s·dY·B)ᵀ·drop(x)` to `grads`; `spare` `[tokens, in]` takes the
    /// dropped input.
    pub(super) fn adapter_gradients(
        &self,
        at: At<'_>,
        operands: AdapterOperands<'_>,
        factor: f64,
        pass: &Pass<'_>,
        grads: &ParamSet,
    ) -> Result<()> {
        let AdapterOperands { dy, x, xa, spare } = operands;
        let outputs = at.group.output();
        let xa = at.xa(xa);
        for (member, adapter) in at.adapted() {
            let of_member = dy.narrow(1, member.row, member.rows);
            let xa = xa.narrow(1, member.column, member.rank);
            self.gemm.multiply(&of_member.tr(), &xa, &grads.view(adapter.b_slot), factor, 1.0)?;
            let through_b = dy.narrow(1, outputs + member.column, member.rank);
            let input = if pass.dropout.is_some() {
                self.drop_into(at, member, x, spare, pass)?;
                spare
            } else {
                x
            };
            self.gemm.multiply(&through_b.tr(), input, &grads.view(adapter.a_slot), factor, 1.0)?;
        }
        self.clock.mark("adapter")
    }

    fn drop_into(&self, at: At<'_>, member: &Member, x: &Tensor, to: &Tensor, pass: &Pass<'_>) -> Result<()> {
        let adapter = at.layer.projection(member.projection).adapter.as_ref();
        let p = adapter.map_or(0.0, |adapter| adapter.dropout);
        dropout_rows_into(x, to, p, self.key(at, member, pass).context("a mask without a key")?)
    }

    fn key(
        &self,
        at: At<'_>,
        member: &Member,
        pass: &Pass<'_>,
    ) -> Option<crate::kernels::dropout::DropoutKey> {
        at.layer.projection(member.projection).key(pass.dropout)
    }
}
