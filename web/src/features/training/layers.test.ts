import { describe, expect, it } from 'vitest';
import { parseLayers, toggle, writeLayers } from './layers';

const layers = (text: string, n = 30) => {
  const parsed = parseLayers(text, n);
  return parsed.ok ? [...parsed.layers].sort((a, b) => a - b) : parsed.reason;
};

describe('parseLayers', () => {
  it('reads each form, and several with commas between', () => {
    expect(layers('all', 3)).toEqual([0, 1, 2]);
    expect(layers('first:2')).toEqual([0, 1]);
    expect(layers('last:2')).toEqual([28, 29]);
    expect(layers('3')).toEqual([3]);
    expect(layers('8-10, 29')).toEqual([8, 9, 10, 29]);
    expect(layers('0-1,1-2')).toEqual([0, 1, 2]);
  });

  it('says why it refuses', () => {
    expect(layers('')).toBe('empty');
    expect(layers('8-')).toBe('grammar');
    expect(layers('top')).toBe('grammar');
    expect(layers('9-3')).toBe('order');
    expect(layers('30')).toBe('range');
    expect(layers('last:31')).toBe('range');
    expect(layers('first:0')).toBe('range');
  });
});

describe('writeLayers', () => {
  it('writes the shortest text, which reads back as the same layers', () => {
    expect(writeLayers(new Set([0, 1, 2]), 3)).toBe('all');
    expect(writeLayers(new Set([28, 29]), 30)).toBe('last:2');
    expect(writeLayers(new Set([5, 3, 4, 9]), 30)).toBe('3-5,9');
    expect(writeLayers(new Set([29]), 30)).toBe('29');
    for (let mask = 1; mask < 128; mask++) {
      const set = new Set([0, 1, 2, 3, 4, 5, 6].filter((bit) => mask & (1 << bit)));
      expect(layers(writeLayers(set, 7), 7)).toEqual([...set]);
    }
  });
});

it('toggles one layer, and a stretch of them', () => {
  expect([...toggle(new Set([1]), 2, null)]).toEqual([1, 2]);
  expect([...toggle(new Set([1, 2]), 2, null)]).toEqual([1]);
  expect([...toggle(new Set([2]), 5, 2)].sort()).toEqual([2, 3, 4, 5]);
  expect([...toggle(new Set([2, 3, 4, 5]), 3, 5)]).toEqual([2]);
});
