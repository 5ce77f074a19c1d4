import { expect, it } from 'vitest';
import { EMPTY, formOf, requestOf, specOf, suffixIsGood } from './form';

const filled = { ...EMPTY, model: 'm', fileId: 'file-1' };

it('asks for nothing until there are a model and examples', () => {
  expect(requestOf(EMPTY)).toBeNull();
  expect(requestOf({ ...EMPTY, model: 'm' })).toBeNull();
  expect(requestOf(filled)).not.toBeNull();
});

it('sends only what was chosen, so that the rest is "auto", and nothing that is empty', () => {
  expect(
    requestOf({ ...filled, hyper: { n_epochs: 3, packing: false, schedule: 'cosine' }, samples: ['', ' '] }),
  ).toEqual({
    model: 'm',
    training_file: 'file-1',
    layers: { method: 'lora', parts: ['attn', 'mlp'], layers: 'last:8', rank: 16 },
    method: {
      type: 'supervised',
      supervised: { hyperparameters: { n_epochs: 3, schedule: 'cosine', packing: false } },
    },
  });
});

it('leaves out of LoRA what has no matrices, and out of full training what only LoRA has', () => {
  expect(specOf({ ...filled, parts: ['attn', 'norm'] }).parts).toEqual(['attn']);
  expect(specOf({ ...filled, method: 'full', parts: ['norm'], rslora: true, quantize: '4bit', alpha: 3 })).toEqual({
    method: 'full',
    parts: ['norm'],
    layers: 'last:8',
  });
  expect(specOf({ ...filled, method: 'dora', rslora: true, quantize: '8bit' })).toEqual({
    method: 'dora',
    parts: ['attn', 'mlp'],
    layers: 'last:8',
    rank: 16,
    rslora: true,
    quantize: '8bit',
  });
});

it('takes only names that can be part of a model id', () => {
  expect(['', 'captain_2', 'a-b'].every(suffixIsGood)).toBe(true);
  expect(['a b', '선장', 'x'.repeat(65)].some(suffixIsGood)).toBe(false);
});

it('takes the whole language as JSON, and asks for nothing while it can not be read', () => {
  const json = '[{"parts": ["attn.q"], "layers": "3"}, {"method": "full", "parts": ["norm"]}]';
  expect(requestOf({ ...filled, json })?.layers).toEqual(JSON.parse(json));
  for (const bad of ['{', '[]', '3', '"all"', '[1]']) expect(requestOf({ ...filled, json: bad })).toBeNull();
  expect(requestOf({ ...filled, parts: [], json: '{"parts": ["attn.q"]}' })?.layers).toEqual({ parts: ['attn.q'] });
});

it('keeps what an earlier job trained, where its own fields could not say it', () => {
  const layers = [
    { method: 'lora' as const, parts: ['attn.q'], layers: '3', rank: 4 },
    { method: 'full' as const, parts: ['norm'], layers: 'all' },
  ];
  for (const some of [layers, layers.slice(0, 1)]) {
    const again = formOf({ model: 'm', training_file: 'file-1', user_provided_suffix: null, layers: some });
    expect(requestOf(again)?.layers).toEqual(some);
  }
});

it('fills itself from an earlier job', () => {
  const form = {
    ...filled,
    suffix: 'captain',
    layers: '3-5',
    method: 'dora' as const,
    validationId: 'file-2',
    samples: ['Ahoy?'],
    hyper: { n_epochs: 2, prefix_cache: true },
  };
  const request = requestOf(form);
  const again = formOf({
    model: 'm',
    training_file: 'file-1',
    validation_file: 'file-2',
    user_provided_suffix: 'captain',
    layers: [specOf(form)],
    hyperparameters: { n_epochs: 2, batch_size: 'auto', prefix_cache: true, unheard_of: 3 },
    sample_prompts: ['Ahoy?'],
  });
  expect(requestOf(again)).toEqual(request);
});
