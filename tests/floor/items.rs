//! The items that every model has. Each is driven on a model and looked at from outside: bytes that were allocated, block tables
//! and ops as the backend saw them, logits bit for bit. What is returned says what was seen.

use anyhow::{Result, ensure};

use crate::recorder::{Call, attention, count};
use crate::stand::{BLOCK_TOKENS, BLOCKS, NoMedia, Stand, open, plan, tokens, work};

/// Keys and values (or latents) lie in pages of a pool, found through block tables.
pub fn paged(stand: &Stand) -> Result<String> {
    let (_, pools) = stand.engine()?;
    ensure!(pools.len() == stand.size("num_hidden_layers")?, "{} pools", pools.len());
    let wanted = stand.cached()?;
    for pool in &pools {
        let Call::Pool { blocks, block_tokens, bytes } = pool else { anyhow::bail!("{pool:?} is no pool") };
        ensure!((*blocks, *block_tokens) == (BLOCKS as usize, BLOCK_TOKENS as usize), "{pool:?}");
        let a_token = bytes / (blocks * block_tokens * size_of::<f32>());
        ensure!(a_token == wanted, "{a_token} values a token were allocated, {wanted} are cached");
    }
    let prompt = tokens(50, 1);
    let (straight, _) = stand.alone(&prompt, &[], 6, None, &mut NoMedia)?;
    let order: Vec<u32> = (0..BLOCKS).map(|n| n * 7 % BLOCKS).rev().collect();
    let (shuffled, calls) = stand.alone(&prompt, &[], 6, Some(order.clone()), &mut NoMedia)?;
    ensure!(shuffled.tokens == straight.tokens, "other tokens over shuffled blocks");
    let same = shuffled.logits.iter().zip(&straight.logits).all(|(a, b)| a.logits == b.logits);
    ensure!(same && shuffled.logits.len() == 55, "other logits over shuffled blocks");
    let tables = attention(&calls);
    ensure!(!tables.is_empty() && tables.iter().all(|batch| order.starts_with(&batch.blocks[0])), "other block tables");
    Ok(format!("{wanted} values"))
}

/// Sequences join and leave between steps, and a step is one forward pass over all of them.
pub fn continuous(stand: &Stand) -> Result<String> {
    let prompts = [tokens(13, 1), tokens(9, 2), tokens(7, 3)];
    let alone: Vec<_> =
        prompts.iter().map(|prompt| Ok(stand.alone(prompt, &[], 4, None, &mut NoMedia)?.0)).collect::<Result<_>>()?;
    let (mut engine, _) = stand.engine()?;
    let [a, b, c] = &prompts;
    // The third takes the slot and the blocks of the first.
    let plans = [
        plan(1, &[], vec![open(0, a, &[])?], vec![work(0, 13, true, &[5])])?,
        plan(2, &[], vec![open(1, b, &[])?], vec![work(0, 1, true, &[]), work(1, 9, true, &[2])])?,
        plan(3, &[], vec![], vec![work(1, 1, true, &[]), work(0, 1, true, &[])])?,
        plan(4, &[0], vec![open(0, c, &[])?], vec![work(1, 1, true, &[]), work(0, 7, true, &[5])])?,
        plan(5, &[1], vec![], vec![work(0, 1, true, &[])])?,
    ];
    let who = [[Some(0), None], [Some(0), Some(1)], [Some(0), Some(1)], [Some(2), Some(1)], [Some(2), None]];
    let (mut drawn, mut projections) = ([0usize; 3], Vec::new());
    for (plan, who) in plans.iter().zip(who) {
        let step = stand.step(&mut engine, plan, &mut NoMedia)?;
        for (slot, sequence) in (0u32..).zip(who) {
            let Some(sequence) = sequence else { continue };
            ensure!(
                step.token(slot)? == alone[sequence].tokens[drawn[sequence]],
                "another token in step {}",
                plan.step
            );
            ensure!(step.agrees(slot, &alone[sequence]), "other logits in step {}", plan.step);
            drawn[sequence] += 1;
        }
        ensure!(count(&step.calls, "embed") == 1, "{} forward passes", count(&step.calls, "embed"));
        projections.push(count(&step.calls, "linear") + count(&step.calls, "moe_experts"));
    }
    ensure!(drawn == [3, 3, 2]);
    ensure!(projections.windows(2).all(|pair| pair[0] == pair[1]), "ops grow with sequences: {projections:?}");
    Ok("joins and leaves".into())
}

/// Chunks of prompts and decodes share one ragged step, each layer's attention one call over pages.
pub fn ragged(stand: &Stand) -> Result<String> {
    let prompts = [tokens(20, 1), tokens(40, 2), tokens(24, 3)];
    let alone: Vec<_> =
        prompts.iter().map(|prompt| Ok(stand.alone(prompt, &[], 2, None, &mut NoMedia)?.0)).collect::<Result<_>>()?;
    let (mut engine, _) = stand.engine()?;
    let [a, b, c] = &prompts;
    let opens = vec![open(0, a, &[])?, open(1, b, &[])?, open(2, c, &[])?];
    let first = vec![work(0, 20, true, &[9, 1]), work(1, 11, false, &[4]), work(2, 15, false, &[7])];
    stand.step(&mut engine, &plan(1, &[], opens, first)?, &mut NoMedia)?;
    // A decode, the middle of a prompt, the end of another.
    let mixed = vec![work(0, 1, true, &[]), work(1, 17, false, &[20]), work(2, 9, true, &[3])];
    let step = stand.step(&mut engine, &plan(2, &[], vec![], mixed)?, &mut NoMedia)?;
    for slot in 0..3u32 {
        ensure!(step.agrees(slot, &alone[slot as usize]), "slot {slot} differs from itself alone");
    }
    ensure!(step.token(0)? == alone[0].tokens[1] && step.token(2)? == alone[2].tokens[0], "other tokens");
    let batches = attention(&step.calls);
    ensure!(batches.len() == stand.size("num_hidden_layers")?, "{} attention calls", batches.len());
    for batch in batches {
        ensure!(batch.query_start == [0, 1, 18, 27] && batch.context == [21, 28, 24], "{batch:?}");
        ensure!(batch.blocks == [vec![9, 1], vec![4, 20], vec![7, 3]], "{batch:?}");
    }
    Ok("1 + 17 + 9 rows".into())
}

/// One table of cos and sin serves all layers of a step, and a position has the same row whenever it is asked for.
pub fn rope_tables(stand: &Stand) -> Result<String> {
    let (mut engine, _) = stand.engine()?;
    let (a, b) = (tokens(30, 1), tokens(30, 2));
    let whole = plan(1, &[], vec![open(0, &a, &[])?], vec![work(0, 30, true, &[0, 1])])?;
    let layers = stand.size("num_hidden_layers")?;
    let mut tables = Vec::new();
    let chunk = plan(2, &[], vec![open(1, &b, &[])?], vec![work(0, 1, true, &[]), work(1, 30, true, &[2, 3])])?;
    for plan in [whole, chunk] {
        let step = stand.step(&mut engine, &plan, &mut NoMedia)?;
        let writes: Vec<_> = step
            .calls
            .iter()
            .filter_map(|call| if let Call::Write { rope, cos, .. } = call { Some((*rope, cos.clone())) } else { None })
            .collect();
        ensure!(writes.len() == layers, "{} writes", writes.len());
        ensure!(writes.iter().all(|(rope, _)| *rope == writes[0].0), "layers have tables of their own");
        ensure!(count(&step.calls, "upload") <= 2, "{} uploads in a step", count(&step.calls, "upload"));
        tables.push(writes[0].1.clone());
    }
    let width = tables[0].len() / 30;
    ensure!(tables[1].len() == 31 * width && tables[1][width..] == tables[0][..], "a position's row changed");
    ensure!(tables[1][..width] != tables[0][29 * width..], "position 30 has the row of 29");
    Ok(format!("1 for {layers} layers"))
}

/// Sums and norms are one op, as are the norms of q and k, the rotation and the write of pages.
pub fn fused_norms(stand: &Stand) -> Result<String> {
    let calls = decode(stand)?;
    let layers = stand.size("num_hidden_layers")?;
    let (_, sparse) = stand.dense_and_sparse()?;
    let glm = stand.name == "glm4_moe_lite";
    // The first and the last norm have no sum before them; nor has that of GLM's query latent.
    let lone = 2 + if glm { layers } else { 0 };
    // The last sum has no norm behind it; a shared expert is added to the routed ones.
    let sums = 1 + if glm { sparse } else { 0 };
    let write = if glm { "mla_norm_rope_cache_write" } else { "qkv_norm_rope_cache_write" };
    expect(&calls, &[("add_rms_norm", 2 * layers - 1), ("rms_norm", lone), ("add", sums), (write, layers)])?;
    Ok(format!("{} sums + norms", 2 * layers - 1))
}

/// Gate and up are one projection, their product one op; experts are one op for all that are touched.
pub fn fused_swiglu(stand: &Stand) -> Result<String> {
    let calls = decode(stand)?;
    let (dense, sparse) = stand.dense_and_sparse()?;
    let layers = dense + sparse;
    let glm = stand.name == "glm4_moe_lite";
    let shared = if glm { sparse } else { 0 };
    // Projections beside the feed-forward: fused qkv and output; GLM's two for queries, one for latents, output. And the head.
    let attention = layers * if glm { 4 } else { 2 } + 1;
    let networks = dense + shared;
    expect(&calls, &[("swiglu", networks), ("linear", attention + 2 * networks), ("moe_experts", sparse)])?;
    let wide = 2 * stand.size("intermediate_size")?;
    let gate_ups = calls.iter().filter(|call| matches!(call, Call::Linear { outputs } if *outputs == wide)).count();
    ensure!(gate_ups == dense, "{gate_ups} projections of {wide} rows");
    Ok(format!("{networks} + {sparse} of experts"))
}

/// Ops of one decode step of two sequences.
fn decode(stand: &Stand) -> Result<Vec<Call>> {
    let (mut engine, _) = stand.engine()?;
    let opens = vec![open(0, &tokens(5, 1), &[])?, open(1, &tokens(8, 2), &[])?];
    let first = vec![work(0, 5, true, &[0]), work(1, 8, true, &[1])];
    stand.step(&mut engine, &plan(1, &[], opens, first)?, &mut NoMedia)?;
    let next = plan(2, &[], vec![], vec![work(0, 1, true, &[]), work(1, 1, true, &[])])?;
    Ok(stand.step(&mut engine, &next, &mut NoMedia)?.calls)
}

fn expect(calls: &[Call], wanted: &[(&str, usize)]) -> Result<()> {
    for (name, times) in wanted {
        let found = count(calls, name);
        ensure!(found == *times, "{name} was called {found} times, {times} are due");
    }
    Ok(())
}
