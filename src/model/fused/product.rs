//! A group's products: forward, gradient of the input, gradients of the adapters.

use anyhow::{Context as _, Result};
use tch::Tensor;

use super::Fused;
use super::group::{Group, GroupName, Member};
use super::pass::Pass;
use super::workspace::matrix;
use crate::kernels::adapter_dropout::{Products, Share};
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
    /// `[tokens, in]`, where products with the dropped input are made.
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
        let kept = at.xa(xa);
        if pass.dropout.is_some() {
            let room = matrix(&self.workspace.inner, pass.tokens, width);
            self.products(at, &a, pass)?.input(&self.gemm, &x, [&spare, &kept], at.scale(), &room)?;
        } else {
            self.gemm.multiply(&x, &a.tr(), &spare, at.scale(), 0.0)?;
            kept.shallow_clone().f_copy_(&spare)?;
        }
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
        if group.ranks() > 0 {
            let through_b = dy.narrow(1, outputs, group.ranks());
            let a = weight.narrow(0, outputs, group.ranks());
            self.products(at, &a, pass)?.to_input(&self.gemm, &through_b, dx, factor, spare)?;
        }
        self.clock.mark("adapter")
    }

    /// Adds `dB = factor · dYᵀ·xa` and `dA = factor · (s·dY·B)ᵀ·drop(x)` to `grads`.
    pub(super) fn adapter_gradients(
        &self,
        at: At<'_>,
        operands: AdapterOperands<'_>,
        factor: f64,
        pass: &Pass<'_>,
        grads: &ParamSet,
    ) -> Result<()> {
        let AdapterOperands { dy, x, xa, spare } = operands;
        let (outputs, ranks) = (at.group.output(), at.group.ranks());
        let xa = at.xa(xa);
        for (member, adapter) in at.adapted() {
            let of_member = dy.narrow(1, member.row, member.rows);
            let xa = xa.narrow(1, member.column, member.rank);
            self.gemm.multiply(&of_member.tr(), &xa, &grads.view(adapter.b_slot), factor, 1.0)?;
            if pass.dropout.is_none() {
                let through_b = dy.narrow(1, outputs + member.column, member.rank);
                self.gemm.multiply(&through_b.tr(), x, &grads.view(adapter.a_slot), factor, 1.0)?;
            }
        }
        if pass.dropout.is_some() && ranks > 0 {
            let a = self.laid_out(at).narrow(0, outputs, ranks).narrow(1, 0, at.group.input);
            let of_a: Vec<Tensor> = at.adapted().map(|(_, adapter)| grads.view(adapter.a_slot)).collect();
            let through_b = dy.narrow(1, outputs, ranks);
            self.products(at, &a, pass)?.to_a(&self.gemm, &through_b, x, &of_a, factor, spare)?;
        }
        self.clock.mark("adapter")
    }

    /// The group's products with dropped inputs; `a` `[ranks, in]`.
    fn products<'a>(&self, at: At<'_>, a: &'a Tensor, pass: &Pass<'_>) -> Result<Products<'a>> {
        let shares = at.adapted().map(|(member, _)| {
            let key = at.layer.projection(member.projection).key(pass.dropout);
            Ok(Share {
                column: member.column,
                columns: member.columns(),
                rank: member.rank,
                key: key.context("a mask without a key")?,
            })
        });
        let p = at.adapted().next().map_or(0.0, |(_, adapter)| adapter.dropout);
        Ok(Products { a, shares: shares.collect::<Result<_>>()?, p })
    }
}
