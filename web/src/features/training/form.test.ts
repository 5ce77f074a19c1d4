import { expect, it } from 'vitest';
import { EMPTY, formOf, requestOf, specOf, suffixIsGood } from './form';

const filled = { ...EMPTY, model: 'm', fileId: 'file-1' };

it('asks for nothing until there are a model and examples', () => {
  expect(requestOf(EMPTY)).toBeNull();
  expect(requestOf({ ...EMPTY, model: 'm' })).toBeNull();
  expect(requestOf(filled)).not.toBeNull();
});

it('sends "auto" for what was left alone, and no alpha, match or name that is empty', () => {
  expect(requestOf({ ...filled, hyper: { ...EMPTY.hyper, n_epochs: 3 } })).toEqual({
    model: 'm',
    training_file: 'file-1',
    layers: { method: 'lora', parts: ['attn', 'mlp'], layers: 'last:8', rank: 16 },
    method: {
      type: 'supervised',
      supervised: {
        hyperparameters: { n_epochs: 3, batch_size: 'auto', learning_rate: 'auto', max_length_tokens: 'auto' },
      },
    },
  });
});

it('leaves out of LoRA what has no matrices, and rank out of full training', () => {
  expect(specOf({ ...filled, parts: ['attn', 'norm'] }).parts).toEqual(['attn']);
  expect(specOf({ ...filled, method: 'full', parts: ['norm'] })).toEqual({
    method: 'full',
    parts: ['norm'],
    layers: 'last:8',
  });
});

it('takes only names that can be part of a model id', () => {
  expect(['', 'captain_2', 'a-b'].every(suffixIsGood)).toBe(true);
  expect(['a b', '선장', 'x'.repeat(65)].some(suffixIsGood)).toBe(false);
});

it('fills itself from an earlier job', () => {
  const request = requestOf({ ...filled, suffix: 'captain', layers: '3-5' });
  const again = formOf({
    model: 'm',
    training_file: 'file-1',
    user_provided_suffix: 'captain',
    layers: [specOf({ ...filled, layers: '3-5' })],
  });
  expect(requestOf(again)).toEqual(request);
});
