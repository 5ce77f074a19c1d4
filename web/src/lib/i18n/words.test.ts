import { describe, expect, it } from 'vitest';
import { en } from './en';
import { ko } from './ko';

function flat(words: object, path = ''): [string, string][] {
  return Object.entries(words).flatMap(([key, value]: [string, unknown]) =>
    typeof value === 'string'
      ? [[`${path}${key}`, value] as [string, string]]
      : flat(value as object, `${path}${key}.`),
  );
}

const holes = (text: string) => [...text.matchAll(/\{\{(\w+)\}\}/g)].map((match) => match[1]).sort();

describe('the two languages', () => {
  const english = flat(en);
  const korean = new Map(flat(ko));

  it('have the same keys', () => {
    expect([...korean.keys()].sort()).toEqual(english.map(([key]) => key).sort());
  });

  it('have the same holes to fill', () => {
    for (const [key, text] of english) expect([key, holes(korean.get(key) ?? '')]).toEqual([key, holes(text)]);
  });

  it('leave no text empty, and no English sentence in Korean but the prompts that the demo model needs', () => {
    const mayBeLatin =
      /^((generate|pictures)\.example\d|generate\.(family_\w+|topP)|sampling\.(topK|minP)|dials\.(eps|attn|mlp)|.*method_lora|hyper.method_dora|.*part_mlp|.*placeholder|gpus\.title|app\.gpus|job\.gpu|keys\.fixed|gpus\.arrivedText)$/;
    for (const [key, text] of korean) {
      expect(text.trim(), key).not.toBe('');
      if (!mayBeLatin.test(key)) expect(text, key).toMatch(/[가-힣]/);
    }
  });
});
