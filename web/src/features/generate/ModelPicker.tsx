import type { Family, Model } from '@/types/api';
import { Select, Text, UnstyledButton } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import css from './ModelPicker.module.css';

const FAMILIES: readonly Family[] = ['llama', 'gpt2', 'sd'];

interface Props {
  models: readonly Model[];
  model: Model | undefined;
  onPick: (id: string) => void;
}

/** First the kind, as three cards, then one of its models. What can't be chosen says why. */
export function ModelPicker({ models, model, onPick }: Props) {
  const { t } = useTranslation();
  const ofFamily = (family: Family) => models.filter((each) => each.family === family);
  const siblings = model ? ofFamily(model.family) : [];
  const option = (each: Model) => ({
    value: each.id,
    label: shortName(each) + (each.available ? '' : ` · ${t('generate.offline')}`),
  });
  return (
    <div className={css.picker}>
      <div className={css.cards} role="group" aria-label={t('generate.family')}>
        {FAMILIES.map((family) => {
          const members = ofFamily(family);
          const why = members.length === 0 ? t(`generate.absent_${family}`) : null;
          return (
            <UnstyledButton
              key={family}
              className={css.card}
              aria-pressed={model?.family === family}
              aria-disabled={why !== null}
              onClick={() => {
                const first = members.find((each) => each.available) ?? members[0];
                if (why === null && first && model?.family !== family) onPick(first.id);
              }}
            >
              <span className={css.name}>{t(`generate.family_${family}`)}</span>
              <span className={css.why}>{why ?? t('generate.models', { count: members.length })}</span>
            </UnstyledButton>
          );
        })}
      </div>
      {model ? (
        <Select
          label={t('generate.model')}
          value={model.id}
          onChange={(id) => id && onPick(id)}
          data={[
            { group: t('generate.base'), items: siblings.filter((each) => !each.parent).map(option) },
            { group: t('generate.tuned'), items: siblings.filter((each) => each.parent).map(option) },
          ].filter((group) => group.items.length > 0)}
          allowDeselect={false}
          searchable={siblings.length > 8}
          comboboxProps={{ shadow: 'md' }}
        />
      ) : null}
      {model && !model.available ? (
        <Text size="sm" className={css.warm}>
          {t('generate.offlineNote')}
        </Text>
      ) : null}
      {model && isSmallDemo(model) ? (
        <Text size="xs" c="dimmed">
          {t('generate.smallModel')}
        </Text>
      ) : null}
    </div>
  );
}

/** Of `ft:base:name:id` the name and a piece of the id, which tells two of one name apart. */
export function shortName(model: Pick<Model, 'id' | 'parent'>): string {
  if (!model.parent) return model.id.split('/').at(-1) ?? model.id;
  const [name, id] = model.id.split(':').slice(-2);
  return `${name} · ${id}`;
}

export const isSmallDemo = (model: Model): boolean => /smollm2?-135m/i.test(model.parent ?? model.id);
