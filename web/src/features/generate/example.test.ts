import { expect, it } from 'vitest';
import type { Ask } from './conversation';
import { exampleOf } from './example';

const ask = (fields: Partial<Ask>): Ask => ({ kind: 'chat', system: '', ...fields }) as Ask;

it('makes a chat of the question and the corrected answer, with the system prompt where there was one', () => {
  expect(exampleOf({ question: 'Ahoy?', ask: ask({}) }, ' Arr! ')).toEqual({
    messages: [
      { role: 'user', content: 'Ahoy?' },
      { role: 'assistant', content: 'Arr!' },
    ],
  });
  expect(exampleOf({ question: 'Ahoy?', ask: ask({ system: ' Be brief. ' }) }, 'Arr!')).toMatchObject({
    messages: [{ role: 'system', content: 'Be brief.' }, { role: 'user' }, { role: 'assistant' }],
  });
});

it('keeps the spaces where a text is continued: they are part of it', () => {
  expect(exampleOf({ question: 'Once', ask: ask({ kind: 'completion' }) }, ' upon a time')).toEqual({
    prompt: 'Once',
    completion: ' upon a time',
  });
});
