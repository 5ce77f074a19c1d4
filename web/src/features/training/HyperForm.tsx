import { Fold } from '@/components/Fold';
import { NumberInput, Select, Text } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { BASIC, CHOICES, NUMBERS, SWITCHES, type ChoiceName, type HyperName, type NumberName } from './form';
import css from './NewJobPage.module.css';
import type { Piece } from './LayersForm';

const GROUPS = [
  ['learning', ['schedule', 'warmup_ratio', 'optimizer', 'weight_decay', 'max_gradient_norm', 'train_on']],
  ['memory', ['micro_batch_rows', 'packing', 'activation_checkpointing', 'prefix_cache', 'stream_layers']],
  ['ending', ['early_stop_patience', 'samples_every_steps']],
] as const satisfies readonly (readonly [string, readonly HyperName[]])[];

/** Every setting of the training: those that people turn first, then the rest. All are "auto" until they are chosen. */
export function HyperForm({ form, set }: Piece) {
  const { t } = useTranslation();
  const advanced = GROUPS.flatMap(([, names]): readonly HyperName[] => names);
  return (
    <>
      <Fold title={t('hyper.basic')} mark={BASIC.some((name) => form.hyper[name] !== undefined)}>
        <div className={css.pair}>
          {BASIC.map((name) => (
            <Field key={name} name={name} form={form} set={set} />
          ))}
        </div>
      </Fold>
      <Fold title={t('hyper.advanced')} mark={advanced.some((name) => form.hyper[name] !== undefined)}>
        {GROUPS.map(([group, names]) => (
          <div key={group} className={css.group} role="group" aria-labelledby={`hyper-${group}`}>
            <Text fw={600} size="sm" id={`hyper-${group}`}>
              {t(`hyper.${group}`)}
            </Text>
            <div className={css.pair}>
              {names.map((name) => (
                <Field key={name} name={name} form={form} set={set} />
              ))}
            </div>
          </div>
        ))}
      </Fold>
    </>
  );
}

function Field({ name, form, set }: Piece & { name: HyperName }) {
  const { t } = useTranslation();
  const value = form.hyper[name];
  const change = (chosen: number | string | boolean | undefined) => {
    const hyper = { ...form.hyper };
    if (chosen === undefined) delete hyper[name];
    else hyper[name] = chosen;
    set({ hyper });
  };
  const shared = { label: t(`hyper.${name}`), description: t(`hyper.${name}_text`) };
  if (isNumber(name)) {
    const limits = NUMBERS[name];
    const decimal = 'decimal' in limits;
    return (
      <NumberInput
        {...shared}
        placeholder={t('hyper.auto')}
        value={typeof value === 'number' ? value : ''}
        onChange={(given) => change(typeof given === 'number' ? given : undefined)}
        min={limits.min}
        max={limits.max}
        allowDecimal={decimal}
        hideControls={decimal}
      />
    );
  }
  const options = isChoice(name)
    ? CHOICES[name].map((each) => ({
        value: each,
        label: t(`hyper.${name}_${each}` as 'hyper.schedule_linear'),
      }))
    : [
        { value: 'true', label: t('hyper.yes') },
        { value: 'false', label: t('hyper.no') },
      ];
  return (
    <Select
      {...shared}
      value={value === undefined ? '' : String(value)}
      onChange={(given) => change(!given ? undefined : isChoice(name) ? given : given === 'true')}
      data={[{ value: '', label: t('hyper.auto') }, ...options]}
      allowDeselect={false}
    />
  );
}

const isNumber = (name: HyperName): name is NumberName => name in NUMBERS;
const isChoice = (name: HyperName): name is ChoiceName =>
  !(SWITCHES as readonly string[]).includes(name) && name in CHOICES;
