import { expect, it } from 'vitest';
import { parseBlocks, writeBlocks } from './blocks';

const BLOCKS = ['down.0', 'down.1', 'down.2', 'mid', 'up.0', 'up.1', 'up.2'];
const blocks = (text: string, known = BLOCKS) => {
  const parsed = parseBlocks(text, known);
  return parsed.ok ? [...parsed.layers].sort((a, b) => a - b).map((at) => known[at]) : parsed.reason;
};

it('reads sides, ranges, ends of the model, and several with commas between', () => {
  expect(blocks('all')).toEqual(BLOCKS);
  expect(blocks('mid')).toEqual(['mid']);
  expect(blocks('up')).toEqual(['up.0', 'up.1', 'up.2']);
  expect(blocks('mid, up.1-2')).toEqual(['mid', 'up.1', 'up.2']);
  expect(blocks('first:1,last:1')).toEqual(['down.0', 'up.2']);
});

it('says why it refuses', () => {
  expect(blocks(' ')).toBe('empty');
  for (const bad of ['3', 'mid.0', 'up.', 'sideways', 'up.1-2-3']) expect(blocks(bad)).toBe('grammar');
  expect(blocks('up.2-1')).toBe('order');
  for (const far of ['up.3', 'down.1-9', 'last:8', 'first:0']) expect(blocks(far)).toBe('range');
});

it('judges only how it is written while the blocks are not known', () => {
  expect(blocks('up.7', [])).toEqual([]);
  expect(blocks('7', [])).toBe('grammar');
});

it('writes the shortest text, which reads back as the same blocks', () => {
  const written = (...names: string[]) => writeBlocks(new Set(names.map((name) => BLOCKS.indexOf(name))), BLOCKS);
  expect(written('mid', 'up.0', 'up.1', 'up.2')).toBe('mid,up');
  expect(written('down.0', 'up.1', 'up.2')).toBe('down.0,up.1-2');
  expect(written()).toBe('');
  for (let mask = 1; mask < 128; mask++) {
    const names = BLOCKS.filter((_, at) => mask & (1 << at));
    expect(blocks(written(...names))).toEqual(names);
  }
});
